"""One step: the forward pass, then a token for each row.

The modules in reading order:

native_model_runner  NativeModelRunner: a batch in, tokens and log-probabilities out
logit_rows           what the logit rows of a batch are used for
sampler              the NumPy sampler: edits, penalties, temperature, filters, draw
philox               random numbers as a function of seed, choice and position
logprobs             log-probabilities of tokens
"""
