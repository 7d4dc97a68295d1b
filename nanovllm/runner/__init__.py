"""One step: the forward pass, then a token for each row.

The modules in reading order:

native_model_runner  NativeModelRunner: a batch in, tokens and log-probabilities out
logit_rows           what the logit rows of a batch are used for
"""
