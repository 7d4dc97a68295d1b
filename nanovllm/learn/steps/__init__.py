"""One package a step: solution.py, check.py (CASES and MISTAKES), page.md and hints.md.

step02_logits      embedding, logits, softmax and cross-entropy
step03_layer_norm  layer normalization
step04_attention   one head, a causal mask, many heads
step05_forward     a block and the whole forward pass
step06_sampling    temperature, top-k, top-p and a draw
step07_kv_cache    keys and values that are kept
step08_blocks      paged blocks, reference counts and prefix sharing
step09_scheduler   continuous batching, chunked prefill and preemption
step10_streaming   whole characters and stop strings
"""
