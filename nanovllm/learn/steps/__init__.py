"""One package a step: solution.py, check.py (CASES and MISTAKES), page.md, hints.md, picture.svg.

step01_tokens      bytes, byte-pair encoding and a bigram
step02_logits      embedding, logits, softmax, cross-entropy
step03_layer_norm  layer normalization
step04_attention   one head, a causal mask, many heads
step05_forward     a block and the whole forward pass
step06_sampling    temperature, top-k, top-p
step07_kv_cache    the KV cache
step08_blocks      paged blocks, reference counts, prefix sharing
step09_scheduler   continuous batching, chunked prefill, preemption
step10_streaming   streaming text and stop strings
step11_backward    the backward pass, AdamW, a training loop
step12_fast        one matmul, from plain loops to most of the machine's peak
"""
