"""The output folder of a run.

The modules in reading order:

checkpoint  files of checkpoints, and the state for resuming
samples     text that a network generates during training
clock       a clock for the speed of a run
lock        a lock on the folder
files       metrics.jsonl, steps.jsonl, samples.jsonl and run.json
"""
