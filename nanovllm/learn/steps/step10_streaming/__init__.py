"""Step 10.

solution  what the reader writes
check     cases and mistakes
"""
