"""Step 7.

solution  what the reader writes
check     cases
mistakes  what goes wrong
"""
