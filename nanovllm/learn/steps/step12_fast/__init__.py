"""Step 12.

solution     what the reader writes
check        cases
<<<<<<< HEAD
mistakes     mistakes
=======
mistakes     mistakes that the check names
>>>>>>> h-e
interpreted  compiled functions, run by Python
"""
