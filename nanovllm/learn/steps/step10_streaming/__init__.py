"""Step 10.

solution  what the reader writes
check     cases
mistakes  what goes wrong
"""
