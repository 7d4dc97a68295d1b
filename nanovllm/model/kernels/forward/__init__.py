"""The forward pass as compiled code: the mirror of nanovllm/model/gpt2.py.

forward     the transformer blocks
head        the output head: logits, or the argmax of each row
prepare     checks a batch and divides its attention into items of work
matmul      a packed matrix product
tiles       its inner loops, with all accumulators in registers
epilogue    bias, activation and residual, applied before a sum is stored
attention   attention over the paged KV cache
layernorm   layer normalization of a row
activation  activation functions on vectors
argmax      argmax fused into the product of the output head
convert     rows in the data types of products and of the cache
"""
