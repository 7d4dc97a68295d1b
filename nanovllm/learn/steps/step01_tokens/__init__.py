"""Step 1.

solution  what the reader writes
check     cases and mistakes
"""
