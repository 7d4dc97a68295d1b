"""The compiled forward pass, backend="numba": Python source compiled by Numba for the host CPU.

Each line imports only from lines below it (the contract in pyproject.toml):

    backend         the class behind the protocol of nanovllm/model/backend.py
    packed_weights  a checkpoint's weights in the kernels' layout
    step_memory     the arrays of a step: KV cache, activations, memory of threads
    sampler         the class behind the protocol of nanovllm/model/sampling.py
    record          writes the addresses of NumPy arrays to records
    library         loads all compiled functions from the cache, or compiles them
    entries         the functions that Python calls
    bandwidth       the read of memory by which bandwidth is measured

    forward         the operations of nanovllm/model/families/forward.py, in the same order
    sampling        the twin of nanovllm/model/numpy_sampler.py: from rows of logits to tokens
    threads         a pool of threads, its barriers and its work counters
    simd            vectors, storage formats and loads and stores of scalars
    step_record     the records through which Python passes arguments to a forward pass
    build           from source to machine code

To learn how a forward pass is computed, begin with `forward`.

A process that finds its machine code in the cache does not import Numba.
"""
