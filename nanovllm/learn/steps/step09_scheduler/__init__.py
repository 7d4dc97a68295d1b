"""Step 9.

solution       what the reader writes
check          cases
classroom      a fake model of 16 blocks, and sequences for it
mistakes       what goes wrong
plan_mistakes  what goes wrong in `schedule` and `commit`
"""
