"""The compiled forward pass, backend="numba": Python source compiled by Numba for the host CPU.

The packages import downward, from the last line of this list to the first. Read from the top:

    forward         the operations of nanovllm/model/gpt2.py, in the same order
    sampling        the twin of nanovllm/runner/sampler.py: from rows of logits to tokens
    threads         a pool of threads, its barriers and its work counters
    simd            vectors, storage formats and loads and stores of scalars
    build           from source to machine code

    backend         the class behind the protocol of nanovllm/model/backend.py
    packed_weights  a checkpoint's weights in the kernels' layout
    sampler         the class behind the protocol of nanovllm/model/sampling.py
    record          writes the addresses of NumPy arrays to records
    step_record     the records of a step, known to Python and to the kernels
    entries         all compiled entry points
    library         loads them from the cache, or compiles them

A process that finds its machine code in the cache does not import Numba.
"""
