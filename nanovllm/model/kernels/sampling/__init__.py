"""Compiled sampling, the twin of nanovllm/model/numpy_sampler.py.

sample    from rows of logits to tokens
record    the arguments of a run, and the layout of scratch memory
filters   min_p, top_k and top_p as one threshold, without sorting
passes    vector passes over a row of scores
logprobs  log-probabilities and ranks
philox    random numbers of draws
"""
