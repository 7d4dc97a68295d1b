"""Training: from text files to a checkpoint that the server loads.

The modules in reading order:

operations            the fused operations, each beside its backward pass: the specification
activation_gradients  derivatives of the activation functions
dropout               dropout masks that are recomputed, not stored
kernels               the operations, compiled
"""
