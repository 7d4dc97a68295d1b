"""The output folder of a run.

The modules in reading order:

checkpoint  files of checkpoints, and the state for resuming
samples     text that a network generates during training
files       metrics.jsonl, samples.jsonl and run.json
"""
