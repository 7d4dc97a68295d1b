"""Run GPT-2's forward pass, hand-written in NumPy, and print the next token.

An observer receives every intermediate; this one prints how a head reads the prompt.

Run: python examples/forward.py
"""

import numpy as np

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.hub import resolve_model
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.forward import forward
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits

PROMPT = "He opened the"
LAYER, HEAD = 1, 3


def main() -> None:
    folder = resolve_model("tiny-books")
    config, tokenizer = load_config(folder), Tokenizer.load(folder)
    weights = load_weights(folder, config)
    cache = KVCache.allocate(config, blocks=1, block_size=config.max_positions)
    batch = ForwardBatch.single(tokenizer.encode(PROMPT))  # one sequence, in block 0 of the cache
    texts = [tokenizer.decode([token]) for token in tokenizer.encode(PROMPT)]

    def observe(name: str, layer: int | None, array: np.ndarray) -> None:
        """Print the scores and the weights of the last token in one head."""
        if name in ("attention_scores", "attention_weights") and layer == LAYER:
            row = array[HEAD, -1]  # of [heads, queries, keys]
            pairs = zip(texts, row, strict=True)
            print(f"{name}: " + ", ".join(f"{text!r} {value:.2f}" for text, value in pairs))

    # [1, d_model]: the last token's
    hidden = forward(config, weights, batch, cache, observe)
    scores = logits(weights, hidden)  # [1, vocab]
    print(PROMPT + tokenizer.decode([int(scores[0].argmax())]))


if __name__ == "__main__":
    main()
