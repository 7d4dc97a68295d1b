"""The network: hand-written NumPy GPT-2 blocks, their weights and the KV cache. Start reading at gpt2.py."""
