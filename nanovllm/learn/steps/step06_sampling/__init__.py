"""Step 6.

solution  what the reader writes
check     cases and mistakes
"""
