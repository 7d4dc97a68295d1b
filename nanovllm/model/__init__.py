"""The network, in NumPy and compiled.

The modules in reading order:

families         GPT-2 and Llama: config.json, tensors, and the forward pass of each
layers           layers that families share: linear, layer_norm, rms_norm, logits
rotary           positions that turn queries and keys
attention        causal attention over the paged KV cache
activation       the activation functions of checkpoints
kv_cache         keys and values of all computed tokens, in blocks
batch            ForwardBatch, the input of a forward pass
observer         what an observer of the forward pass receives
config           ModelConfig, the sizes and options of a network
weights          the tree of a network's weights
ablation         a network with parts switched off
tokenizer_files  the tokenizer of a model folder
tokenizer_growth  refuses tokenizers that multiply texts
token_spelling   the bytes that each token of a vocabulary stands for
checkpoint       weights from safetensors files
sampling         SamplingSettings and the protocol of a sampler
numpy_sampler    the sampler in NumPy: edits, penalties, temperature, filters, draw
philox           random numbers as a function of seed, choice, position and token
logprobs         log-probabilities of tokens
backend          the protocol of a backend, and LoadOptions
numpy_backend    backend="numpy": a family behind that protocol
quantization     int8 weights: scales, multipliers, outliers
kernels          backend="numba": the compiled forward pass and sampler
machine          the processor, and the cores and the memory that this process may use
"""
