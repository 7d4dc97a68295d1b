"""Speculative decoding: tokens that are drafted cheaply and verified in one step.

draft_model  a smaller model with its own KV cache
acceptance   how often drafted tokens of each source were accepted
cost_model   how many drafted tokens pay, by measured times
speculator   which tokens are drafted in a step, and what has become of them
"""
