"""The forward pass as compiled code: the mirror of nanovllm/model/families.

forward          embedding, transformer blocks and final layer normalization
head             the output head: logits, or the argmax of each row without storing logits
steps            several greedy steps in one run, for drafts
prepare          checks a batch and divides its attention into items
matmul           linear layers: packed matmuls with an epilogue
tiles            tiles of rows that share a panel, or have one each
unit_tiles       the same on the CPU's tile unit (Intel AMX)
epilogue         bias, activation and residual, applied before a result is stored
attention        attention over the paged KV cache
attend           one query in several heads, or several queries that share keys and values
attention_parts  softmax and the matmuls of attention
kv_cache         layout of the cache; stores keys and values
rotary           turns queries and keys by their positions
layernorm        layer and RMS normalization of a row
convert          converts rows to the types of linear layers and of the cache
"""
