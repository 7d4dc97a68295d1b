"""Search passages by meaning: embed them, and rank them by cosine similarity to the query.

The bundled model knows the books it was trained on, so it tells their topics apart. A model trained
for embeddings ranks other texts better.

Run: python examples/search.py "the sailors hunted in the ocean"
"""

import sys

import numpy as np

from nanovllm import LLM

TEXTS = [
    "The whale rose beside the boat, and the captain called for his harpoon.",
    "Elizabeth and her sister talked of the ball, and of the gentlemen who had danced.",
    "Holmes examined the footprints, and told me who had murdered the man.",
    "The Count lay in his coffin, with blood upon his lips.",
]


def main(query: str) -> None:
    with LLM("tiny-books") as llm:
        outputs = llm.embed([query, *TEXTS], pooling="mean")
    vectors = np.array([output.outputs.embedding for output in outputs], dtype=np.float32)
    # Without the texts' common mean, the vectors are easier to tell apart.
    vectors -= vectors[1:].mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors[1:] @ vectors[0]
    for index in np.argsort(-cosines):
        print(f"{cosines[index]:+.3f}  {TEXTS[index]}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]) or "the murderer was found")
