"""Search texts by meaning: embed them, and rank them by cosine similarity to the query.

The embeddings of a language model find texts of similar wording. A model trained for embeddings
ranks better.

Run: python examples/search.py "a ship in the storm"
"""

import sys

import numpy as np

from nanovllm import LLM

TEXTS = [
    "The ship was driven by the wind upon the rocks.",
    "The king sat upon his throne and spoke to his people.",
    "She walked in the garden among the roses.",
    "The horses ran across the field.",
    "The sailors saw the great waves of the sea.",
]


def main(query: str) -> None:
    with LLM("tiny-books") as llm:
        outputs = llm.embed([query, *TEXTS], pooling="mean")
    vectors = np.array([output.outputs.embedding for output in outputs], dtype=np.float32)
    # Without their common mean, the vectors are easier to tell apart.
    centered = vectors - vectors.mean(axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    cosines = centered[1:] @ centered[0]
    for index in np.argsort(-cosines):
        print(f"{cosines[index]:+.3f}  {TEXTS[index]}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "A boat was lost in the storm at sea.")
