"""GPT-2 with its gradients, in NumPy.

The modules in reading order:

model             GPT-2's forward pass on a tape, the twin of model/families/forward.py
autograd          reverse-mode automatic differentiation
numpy_operations  the fused operations, each beside its backward pass: the specification
operations        their interface
dropout           dropout masks that are recomputed, not stored
parameters        parameters and gradients as named views of flat arrays
optimizer         AdamW and gradient clipping
schedule          the learning rate of each update
"""
