"""Training: from text files to a checkpoint that the server loads.

The modules in reading order:

model                 GPT-2's forward pass on a tape, the twin of nanovllm/model/gpt2.py
autograd              reverse-mode automatic differentiation
operations            the fused operations, each beside its backward pass: the specification
activation_gradients  derivatives of the activation functions
dropout               dropout masks that are recomputed, not stored
parameters            parameters and gradients as named views of flat arrays
samples               text that a network generates during training
checkpoint            files of checkpoints, written to a temporary name and renamed
config                the settings of a run
stopping              Ctrl-C ends a run between two steps
optimizer             AdamW, gradient clipping, and the learning rate schedule
scoring               the loss of every token of a text, by a loaded network
"""
