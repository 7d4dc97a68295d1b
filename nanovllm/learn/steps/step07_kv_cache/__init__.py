"""Step 7.

solution  what the reader writes
check     cases and mistakes
"""
