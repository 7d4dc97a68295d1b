"""Families of decoders: what a checkpoint's config.json and tensors mean, and what is computed.

Each is a folder with a reader of config.json, the names and shapes of tensors, and the parts of the
forward pass in NumPy.

gpt2      GPT-2
llama     Llama, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3
registry  which family a config.json belongs to
forward   the forward pass, the specification of the compiled one
"""
