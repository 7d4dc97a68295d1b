"""Step 3.

solution  what the reader writes
check     cases and mistakes
"""
