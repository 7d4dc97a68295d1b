"""Step 9.

solution  what the reader writes
check     cases and mistakes
"""
