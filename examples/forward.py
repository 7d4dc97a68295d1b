"""Run the forward pass of nanovllm/model/gpt2.py, hand-written in NumPy, and print the next token.

Run: python examples/forward.py
"""

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.hub import resolve_model
from nanovllm.model import gpt2
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.kv_cache import KVCache

PROMPT = "He opened the"


def main() -> None:
    folder = resolve_model("tiny-books")
    config, tokenizer = GPT2Config.load(folder), Tokenizer.load(folder)
    weights = load_weights(folder, config)
    cache = KVCache.allocate(config, blocks=1, block_size=config.max_positions)
    batch = ForwardBatch.single(tokenizer.encode(PROMPT))  # one sequence, in block 0 of the cache
    hidden = gpt2.forward(config, weights, batch, cache)  # [1, d_model]: the last token's
    scores = gpt2.logits(weights, hidden)  # [1, vocab]
    print(PROMPT + tokenizer.decode([int(scores[0].argmax())]))


if __name__ == "__main__":
    main()
