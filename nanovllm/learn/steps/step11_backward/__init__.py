"""Step 11.

solution  what the reader writes
check     cases
mistakes  mistakes that the check names
"""
