"""The compiled operations of training: the twin of
nanovllm/training/network/numpy_operations.py.

They are compiled as the forward pass of nanovllm/model/kernels is, to a library of their own. Each
line imports only from lines below it (the contract in pyproject.toml):

    operations            CompiledOperations
    runner                calls compiled operations with their arguments on the threads
    plan                  the operations, the runs of the threads and the memory of a pass
    library               loads the compiled operations from the cache, or compiles them
    entries               the functions that Python calls: run_calls, and those of the pool

    attention             causal self-attention and its gradients
    layer_norm            layer normalization and its gradients
    embedding             token and position embeddings and their gradients
    cross_entropy         the loss and its gradients, a chunk of rows at a time
    linear                linear layers and their gradients
    optimizer             AdamW, and the sum of squares that clipping needs

    matmul                C = A @ B, A @ B^T and A^T @ B
    phases                operations: items of work that the threads share; run_calls
    dropout               dropout masks in vectors
    records               the arguments of each operation
"""
