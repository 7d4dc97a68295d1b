"""Step 12.

solution     what the reader writes
check        cases and mistakes
interpreted  compiled functions, run by Python
"""
