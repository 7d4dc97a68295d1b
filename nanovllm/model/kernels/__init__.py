"""The compiled forward pass, backend="numba": Python source that is compiled for the very CPU it runs on.

Read in this order: vector.py (the vocabulary of the inner tiles), formats.py (float32, bfloat16 and int8 in
one layout), matmul.py (packed products), attention.py, forward.py (the same list of operations as
nanovllm/model/gpt2.py), head.py (logits and argmax). parameters.py says what the compiled code is given,
packing.py how weights are laid out for it, quantise.py how rows become bytes, target.py what a compilation
is for.

Sampling is beside it: sampling.py (from rows of logits to tokens), filters.py and select.py (top-k and top-p without sorting), reports.py
(log-probabilities), scores.py (the vector passes over a row) and scalars.py (single numbers at addresses). greedy.py finds the most likely
word while the head's product goes on.

Threads: pool.py (Python's side), helpers.py and threads.py (the compiled side), atomics.py, layout.py (the memory between them), processors.py
(how many cores there are) and contention.py (how many threads to use while other programs take cores).
From source to machine code: entries.py and compiler.py, which need Numba; library.py, object_cache.py and processor.py, which do not: a
process that finds its code in the cache never imports it.
"""
