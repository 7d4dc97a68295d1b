"""The compiled forward pass, backend="numba": Python source that is compiled for the very CPU it runs on.

Read in this order: vector.py (the vocabulary of the inner tiles), matmul.py (packed products), attention.py, forward.py (the same list of
operations as nanovllm/model/gpt2.py). parameters.py says what the compiled code is given, packing.py how weights are laid out for it,
pool.py how several threads enter it.

Sampling is beside it: sampling.py (from rows of logits to tokens), filters.py and select.py (top-k and top-p without sorting), reports.py
(log-probabilities), scores.py (the vector passes over a row) and scalars.py (single numbers at addresses). greedy.py finds the most likely
word while the head's product goes on.
"""
