"""Step 12.

solution     what the reader writes
check        cases
mistakes     mistakes that the check names
interpreted  compiled functions, run by Python
"""
