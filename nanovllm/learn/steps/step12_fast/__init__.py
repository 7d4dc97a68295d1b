"""Step 12.

solution     what the reader writes
check        cases
mistakes     mistakes
interpreted  compiled functions, run by Python
"""
