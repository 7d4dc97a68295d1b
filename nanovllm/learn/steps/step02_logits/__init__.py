"""Step 2.

solution  what the reader writes
check     cases and mistakes
"""
