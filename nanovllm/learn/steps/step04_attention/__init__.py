"""Step 4.

solution  what the reader writes
check     cases and mistakes
"""
