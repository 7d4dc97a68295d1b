"""Training: from text files to a checkpoint that the server loads.

The modules in reading order:

model                 GPT-2's forward pass on a tape, the twin of nanovllm/model/gpt2.py
autograd              reverse-mode automatic differentiation
operations            the fused operations, each beside its backward pass: the specification
activation_gradients  derivatives of the activation functions
dropout               dropout masks that are recomputed, not stored
kernels               the operations, compiled
parameters            parameters and gradients as named views of flat arrays
optimizer             AdamW, gradient clipping, and the learning rate schedule
text                  text files, and their split into training and validation
tokenizer             character-level and byte-level BPE tokenizers
dataset               batches without padding
prepare               from files to the two splits of a run
config                the settings of a run
setup                 data, tokenizer and network before the first step
trainer               the training loop
stopping              Ctrl-C ends a run between two steps
checkpoint            files of checkpoints, written to a temporary name and renamed
samples               text that a network generates during training
run_files             metrics.jsonl, samples.jsonl and run.json
report                the HTML report of a run, or of several
scoring               the loss of every token of a text, by a loaded network
"""
