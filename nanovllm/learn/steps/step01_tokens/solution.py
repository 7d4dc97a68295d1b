"""Step 1: bytes, byte-pair encoding and a bigram.

Byte-pair encoding for text is of Sennrich, Haddow and Birch 2016 (arXiv:1508.07909); on bytes it is
of GPT-2 (Radford et al. 2019, section 2.2).
"""

from itertools import pairwise

import numpy as np

Pair = tuple[int, int]


def to_bytes(text: str) -> list[int]:
    """Return the UTF-8 bytes of a text, each from 0 to 255."""
    return list(text.encode("utf-8"))


def count_pairs(ids: list[int]) -> dict[Pair, int]:
    """Return how often each pair of neighbours occurs, in order of its first occurrence.

    In [7, 7, 7] the pair (7, 7) occurs twice.
    """
    counts: dict[Pair, int] = {}
    for pair in pairwise(ids):
        counts[pair] = counts.get(pair, 0) + 1
    return counts


def merge_pair(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    """Return the ids with each occurrence of the pair, from left to right, replaced by `new_id`.

    [7, 7, 7] with the pair (7, 7) becomes [new_id, 7]. `ids` must not be changed.
    """
    merged = []
    index = 0
    while index < len(ids):
        if ids[index] == pair[0] and ids[index + 1 : index + 2] == [pair[1]]:
            merged.append(new_id)
            index += 2
        else:
            merged.append(ids[index])
            index += 1
    return merged


def learn_merges(text: str, num_merges: int) -> list[Pair]:
    """Return the pairs to merge, in order: each time the most frequent pair of neighbours.

    The first merge makes token 256, the next one token 257, and so on; a pair can have such tokens.
    Of equally frequent pairs the one that occurs first in the text is taken. There are fewer than
    `num_merges` where no pair occurs twice any more.
    """
    ids = to_bytes(text)
    merges: list[Pair] = []
    while len(merges) < num_merges:
        counts = count_pairs(ids)
        best = max(counts, key=lambda pair: counts[pair], default=None)
        if best is None or counts[best] < 2:
            break
        ids = merge_pair(ids, best, 256 + len(merges))
        merges.append(best)
    return merges


def encode(text: str, merges: list[Pair]) -> list[int]:
    """Return the token ids of a text: its bytes, then all merges in the order of learning."""
    ids = to_bytes(text)
    for rank, pair in enumerate(merges):
        ids = merge_pair(ids, pair, 256 + rank)
    return ids


def decode(ids: list[int], merges: list[Pair]) -> str:
    """Return the text of token ids; what is not UTF-8 becomes U+FFFD.

    A token can be a part of a character, so the bytes of all tokens are joined first.
    """
    token_bytes = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        token_bytes.append(token_bytes[left] + token_bytes[right])
    return b"".join(token_bytes[token_id] for token_id in ids).decode("utf-8", errors="replace")


def bigram_probabilities(ids: list[int], vocab: int, smoothing: float) -> np.ndarray:
    """Return the probability of each token after each token, from counts in a text.

    `smoothing` is added to every count, so that a pair that the text does not have is not
    impossible.

    Args:
        ids: tokens of the text, each from 0 to vocab - 1.
        vocab: number of tokens.
        smoothing: above 0.

    Returns:
        [vocab, vocab], float64; row i has the probabilities of the token after i and sums to 1.
    """
    counts = np.full((vocab, vocab), smoothing)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def bits_per_byte(ids: list[int], probabilities: np.ndarray, num_bytes: int) -> float:
    """Return the sum of -log2 p over all tokens but the first, divided by the bytes of the text.

    Args:
        ids: tokens of the text.
        probabilities: [vocab, vocab], as of `bigram_probabilities`.
        num_bytes: UTF-8 bytes of the text.
    """
    return float(-np.log2(probabilities[ids[:-1], ids[1:]]).sum() / num_bytes)
