"""Causal self-attention and its gradients.

Each line imports only from lines below it:

forward   the output, a block of queries at a time
backward  the gradients, a block of keys at a time
tiles     matmuls of attention, also along the causal diagonal
layout    the working memory
"""
