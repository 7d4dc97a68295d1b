"""What step 1 must do, and what goes wrong."""

import json
from functools import cache
from types import ModuleType

import numpy as np

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.hub.names import bundled_folder
from nanovllm.learn.checking import Case, Mistake, require
from nanovllm.learn.texts import alice, grimm

_EXAMPLE = "aaabdaaabac"
_EXAMPLE_MERGES = [(97, 97), (256, 97), (257, 98)]
_TAIL = [5, 5, 5, 1, 2, 5, 5, 1, 2, 1]
_EMOJI = "é, € and \N{GRINNING FACE}"
_WORDS = (" gardener", "naïve")


def _pairs(module: ModuleType) -> object:
    counts = module.count_pairs(_TAIL)
    require(isinstance(counts, dict), "count_pairs must return a dict")
    return {"the pairs, sorted:": sorted(counts), "the counts of the pairs, sorted:": [
        counts[pair] for pair in sorted(counts)]}  # fmt: skip


def _merge(module: ModuleType, *ids: int) -> object:
    given = list(ids)
    merged = module.merge_pair(given, (5, 5), 256)
    require(given == list(ids), "merge_pair changed the list it was given")
    return merged


def _round_trip(module: ModuleType) -> object:
    merges = module.learn_merges(_EMOJI * 2, 20)
    return module.decode(module.encode(_EMOJI, merges), merges)


@cache
def _model_merges() -> tuple[Tokenizer, list[tuple[int, int]], dict[bytes, int]]:
    """Return the bundled model's tokenizer, its merges, and the id in this step of each token."""
    tokenizer = Tokenizer.load(bundled_folder())
    described = json.loads(tokenizer.as_json())["model"]
    ids = {bytes([byte]): byte for byte in range(256)}
    merges = []
    for pair in described["merges"]:
        left, right = (tokenizer.token_bytes(described["vocab"][name]) for name in pair)
        merges.append((ids[left], ids[right]))
        ids[left + right] = 255 + len(merges)
    return tokenizer, merges, ids


def _as_model(module: ModuleType) -> object:
    merges = _model_merges()[1]
    return {f"the tokens of {word!r}:": module.encode(word, merges) for word in _WORDS}


def _model_tokens() -> object:
    tokenizer, _, ids = _model_merges()
    return {
        f"the tokens of {word!r}:": [ids[tokenizer.token_bytes(i)] for i in tokenizer.encode(word)]
        for word in _WORDS
    }


def _bigram(module: ModuleType) -> object:
    """Learn 10 merges and a bigram from one text, and judge another."""
    text, other = grimm()[:500], alice()[:200]
    merges = module.learn_merges(text, 10)
    ids = module.encode(text, merges)
    probabilities = module.bigram_probabilities(ids, 256 + len(merges), 0.1)
    return module.bits_per_byte(module.encode(other, merges), probabilities, len(other.encode()))


_CHANCES = np.array([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5], [0.25, 0.5, 0.25]])

CASES = (
    Case(
        "bytes of a, é and €",
        lambda module: [module.to_bytes(character) for character in "aé€"],
        lambda: [[97], [195, 169], [226, 130, 172]],
        "UTF-8 has one to four bytes a character.",
    ),
    Case("pairs of neighbours", _pairs, lesson="5, 5, 5 has the pair (5, 5) twice."),
    Case(
        "a pair is merged",
        lambda m: [_merge(m, 1, 5, 5, 2), _merge(m, 5, 5, 5), _merge(m, 5, 5, 5, 5, 1, 5)],
        lambda: [[1, 256, 2], [256, 5], [256, 256, 1, 5]],
        "From left to right; a token that was merged cannot be merged again in the same pass.",
    ),
    Case("nothing to merge", lambda m: [_merge(m), _merge(m, 5), _merge(m, 5, 1, 5)]),
    Case(
        f"three merges of {_EXAMPLE}",
        lambda module: module.learn_merges(_EXAMPLE, 3),
        lambda: _EXAMPLE_MERGES,
        "(97, 97) is aa, (256, 97) is aaa, (257, 98) is aaab.",
    ),
    Case(
        "no pair occurs twice any more",
        lambda module: [module.learn_merges(text, 9) for text in ("abab", "abc", "a", "")],
        lambda: [[(97, 98)], [], [], []],
    ),
    Case("12 merges of a tale", lambda module: module.learn_merges(grimm()[:500], 12)),
    Case(
        f"tokens of {_EXAMPLE}",
        lambda module: module.encode(_EXAMPLE, _EXAMPLE_MERGES),
        lambda: [258, 100, 258, 97, 99],
    ),
    Case(
        "the same words as the bundled model",
        _as_model,
        _model_tokens,
        "The merges are those of the model's tokenizer.json; a merge learned earlier goes first.",
    ),
    Case(
        "the text of tokens",
        lambda module: module.decode([258, 100, 258, 97, 99], _EXAMPLE_MERGES),
        lambda: _EXAMPLE,
    ),
    Case("a text is the same after encode and decode", _round_trip, lambda: _EMOJI),
    Case(
        "the first two bytes of € alone",
        lambda module: module.decode([97, 226, 130], []),
        lambda: "a\ufffd",
        "A model can stop in the middle of a character.",
    ),
    Case(
        "a bigram of three tokens",
        lambda module: module.bigram_probabilities([0, 1, 0, 1, 1, 0, 2], 3, 0.5),
        lambda: np.array([[1, 5, 3], [5, 3, 1], [3, 3, 3]]) / 9,
        "After 0 come 1, 1 and 2. With 0.5 for each: 0.5, 2.5 and 1.5 of 4.5.",
    ),
    Case(
        "bits per byte of four tokens",
        lambda module: module.bits_per_byte([0, 0, 2, 1], _CHANCES, 8),
        lambda: 0.5,
        "0.5, 0.25 and 0.5 are 1, 2 and 1 bits.",
    ),
    Case("a bigram learned from one text judges another", _bigram),
)

_COUNT = "    for pair in pairwise(ids):\n"
_APPLY = (
    "    for rank, pair in enumerate(merges):\n        ids = merge_pair(ids, pair, 256 + rank)\n"
)
_BEST = "best = max(counts, key=lambda pair: counts[pair], default=None)"
_ADD = "np.add.at(counts, (ids[:-1], ids[1:]), 1)"
_BITS = "return float(-np.log2(probabilities[ids[:-1], ids[1:]]).sum() / num_bytes)"

MISTAKES = (
    Mistake(
        "code points for bytes",
        "ord() gives the number of a character, up to 1,114,111. There are 256 bytes, and a "
        "character is one to four of them: text.encode('utf-8').",
        'return list(text.encode("utf-8"))',
        "return [ord(character) for character in text]",
    ),
    Mistake(
        "Latin-1 for UTF-8",
        "The text is encoded as Latin-1, which has 256 characters only; use UTF-8.",
        'return list(text.encode("utf-8"))',
        "return list(text.encode('latin-1', 'replace'))",
    ),
    Mistake(
        "pairs side by side",
        "Only the pairs at 0 and 1, 2 and 3, and so on are counted. Each token and its right "
        "neighbour are a pair, so n tokens have n - 1.",
        _COUNT,
        "    for pair in zip(ids[::2], ids[1::2]):\n",
    ),
    Mistake(
        "last pair not counted",
        "The last pair is missing: n tokens have n - 1 pairs.",
        _COUNT,
        "    for pair in pairwise(ids[:-1]):\n",
    ),
    Mistake(
        "pairs without order",
        "(1, 2) and (2, 1) are counted as the same pair.",
        _COUNT,
        f"{_COUNT}        pair = (min(pair), max(pair))\n",
    ),
    Mistake(
        "right token not removed",
        "Only the left token of the pair is replaced; the right one stays. Go on two tokens.",
        "            index += 2\n",
        "            index += 1\n",
    ),
    Mistake(
        "only the first occurrence",
        "Only the first occurrence of the pair is merged.",
        "if ids[index] == pair[0] and",
        "if new_id not in merged and ids[index] == pair[0] and",
    ),
    Mistake(
        "last token lost",
        "The loop ends one token too early, so a last token without a partner is lost.",
        "while index < len(ids):",
        "while index < len(ids) - 1:",
    ),
    Mistake(
        "merged in place",
        "The list that was given is changed. The caller still needs it: make a new one.",
        "    return merged\n",
        "    ids[:] = merged\n    return ids\n",
    ),
    Mistake(
        "new ids from 0",
        "The first merge makes token 0 or 255; 0 to 255 are the bytes, so it must make 256.",
        "ids = merge_pair(ids, best, 256 + len(merges))\n        merges.append(best)",
        "merges.append(best)\n        ids = merge_pair(ids, best, len(merges) - 1)",
    ),
    Mistake(
        "pairs of the bytes only",
        "The pairs are counted in the bytes of the text every time. Count them in the text as the "
        "earlier merges left it, so that a merge can build on a merge.",
        "ids = merge_pair(ids, best, 256 + len(merges))",
        "ids = [0 if pair == best else i for i, pair in zip(ids, [*pairwise(ids), None])]",
    ),
    Mistake(
        "last of equal pairs",
        "Of equally frequent pairs the one that was seen last is taken. Any rule would do, but it "
        "must be the documented one: the first, as max() does.",
        _BEST,
        "best = max(reversed(counts), key=lambda pair: counts[pair], default=None)",
    ),
    Mistake(
        "rare pairs merged",
        "A pair that occurs once is merged. The new token shortens nothing but this one place.",
        "if best is None or counts[best] < 2:",
        "if best is None:",
    ),
    Mistake(
        "least frequent pair",
        "The rarest pair is merged first.",
        _BEST,
        "best = min(counts, key=lambda pair: counts[pair], default=None)",
    ),
    Mistake(
        "merges not numbered",
        "encode gives every merge the id 256. Merge number i makes token 256 + i.",
        "ids = merge_pair(ids, pair, 256 + rank)",
        "ids = merge_pair(ids, pair, 256)",
    ),
    Mistake(
        "merges in reverse",
        "The last merge is applied first. It may need the tokens that the earlier ones make.",
        "for rank, pair in enumerate(merges):",
        "for rank, pair in reversed(list(enumerate(merges))):",
    ),
    Mistake(
        "greedy by the left",
        "The first pair of the text that has a merge is merged, whichever it is. The merge that "
        "was learned first goes first, everywhere in the text.",
        _APPLY,
        "    index = 0\n"
        "    while index < len(ids) - 1:\n"
        "        pair = (ids[index], ids[index + 1])\n"
        "        if pair in merges:\n"
        "            ids[index : index + 2] = [256 + merges.index(pair)]\n"
        "            index = 0\n"
        "        else:\n"
        "            index += 1\n",
    ),
    Mistake(
        "each token decoded alone",
        "Every token is decoded on its own, so a character whose bytes are in two tokens is lost. "
        "Join the bytes first.",
        'b"".join(token_bytes[token_id] for token_id in ids).decode("utf-8", errors="replace")',
        '"".join(token_bytes[token_id].decode("utf-8", errors="replace") for token_id in ids)',
    ),
    Mistake(
        "incomplete character raises",
        "Bytes that are not UTF-8 raise UnicodeDecodeError. A model may write any bytes, so decode "
        'with errors="replace".',
        '.decode("utf-8", errors="replace")',
        '.decode("utf-8")',
    ),
    Mistake(
        "merged bytes reversed",
        "The bytes of a merged token are put together in the wrong order: left, then right.",
        "token_bytes[left] + token_bytes[right]",
        "token_bytes[right] + token_bytes[left]",
    ),
    Mistake(
        "repeated pairs counted once",
        "counts[a, b] += 1 with arrays of indices adds 1 once, however often a pair occurs. "
        "np.add.at adds for each occurrence.",
        _ADD,
        "counts[ids[:-1], ids[1:]] += 1",
    ),
    Mistake(
        "token before for token after",
        "The table is transposed: row i must have what comes after token i.",
        _ADD,
        "np.add.at(counts, (ids[1:], ids[:-1]), 1)",
    ),
    Mistake(
        "columns sum to 1",
        "The counts are divided by the sums of the columns. Row i is the distribution after token "
        "i: axis=1.",
        "counts.sum(axis=1, keepdims=True)",
        "counts.sum(axis=0, keepdims=True)",
    ),
    Mistake(
        "row sums as a row",
        "sum(axis=1) has the shape [vocab], so column j is divided by the sum of row j. "
        "keepdims=True gives [vocab, 1], which divides row i by its own sum.",
        "counts.sum(axis=1, keepdims=True)",
        "counts.sum(axis=1)",
    ),
    Mistake(
        "probabilities of pairs",
        "The counts are divided by the sum of the whole table: the probability of the pair, not of "
        "the token after a given one.",
        "counts.sum(axis=1, keepdims=True)",
        "counts.sum()",
    ),
    Mistake(
        "no smoothing",
        "`smoothing` is not added. A pair that the text does not have gets probability 0, and one "
        "such pair makes the loss of any text infinite.",
        "np.full((vocab, vocab), smoothing)",
        "np.zeros((vocab, vocab))",
    ),
    Mistake(
        "nats for bits",
        "The natural logarithm gives nats; bits need np.log2.",
        "np.log2(",
        "np.log(",
    ),
    Mistake(
        "divided by the tokens",
        "The sum is divided by the number of tokens. A tokenizer with longer tokens would look "
        "worse although it is not: divide by the bytes.",
        _BITS,
        _BITS.replace("num_bytes", "(len(ids) - 1)"),
    ),
    Mistake(
        "no sign",
        "The logarithm of a probability is negative; bits are its opposite.",
        "float(-np.log2",
        "float(np.log2",
    ),
    Mistake(
        "probability of staying",
        "The probability is read at [token, token]. It must be [token, next token].",
        _BITS,
        _BITS.replace("ids[:-1], ids[1:]", "ids[1:], ids[1:]"),
    ),
)
