"""The output folder of a run.

The modules in reading order:

checkpoint  files of checkpoints, written to a temporary name and renamed
samples     text that a network generates during training
files       metrics.jsonl, samples.jsonl and run.json
"""
