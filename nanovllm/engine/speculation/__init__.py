"""Speculative decoding: tokens that are drafted cheaply and verified in one step.

draft_model  a smaller model with its own KV cache
cost_model   how many drafted tokens pay, by measured times
speculator   which tokens are drafted in a step, and what has become of them
"""
