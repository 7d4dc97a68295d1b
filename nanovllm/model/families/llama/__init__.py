"""Llama (Touvron et al. 2023) and its relatives: TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3.

config   reads their config.json, and says what differs between them
tensors  names, shapes and places of their tensors
network  their parts of the forward pass: embed, self_attention, feed_forward
"""
