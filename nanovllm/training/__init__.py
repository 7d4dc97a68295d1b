"""Training: from text files to a checkpoint that the server loads.

The modules in reading order:

network       GPT-2 with its gradients, in NumPy
kernels       the operations of the network, compiled
data          text files, tokenizers and batches
config        the settings of a run
setup         data, tokenizer and network before the first step
resume        the saved state of a run, from which it continues
counters      sums between two evaluations, and the best validation loss
run           the files of a run: checkpoints, metrics and samples
metrics       the lines of metrics.jsonl and samples.jsonl
report        the HTML report of a run, or of several
commands      commands that messages name
atomic_files  files that are written to a temporary name and renamed
"""
