"""How many times longer a tokenizer may make a text: a hostile one fills the memory.

A tokenizer.json may replace each `a` by a thousand, in three steps by 10^9, and the library aborts
the process where memory ends. The steps of each part are therefore bounded when a file is loaded:
the normalizer and the pre-tokenizer of a text, the decoder, and the post-processor of the tokens.

Unicode's own normal forms and lower case lengthen a text by 11 at most, however many there are.
They do not count.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

MAX_GROWTH = 64
"""Of a part; those of Llama, Gemma, ALBERT and XLM-RoBERTa lengthen a text by 16 at most."""
MAX_STEPS = 64
"""Of a part, each of which reads the whole text."""
MAX_ADDED_TOKENS = 1024
"""Of a post-processor, around the tokens of a text; models in use add 2 at most."""
_MAX_CHARACTER_BYTES = 36
"""Of what one character becomes in the tables of SentencePiece, which are Unicode's normal form."""
_SEQUENCES = ("normalizers", "pretokenizers", "decoders", "processors")


def check_growth(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer that multiplies texts or tokens."""
    parts = {
        "normalizer and pre-tokenizer": (tokenizer.normalizer, tokenizer.pre_tokenizer),
        "decoder": (tokenizer.decoder,),
        "post-processor": (tokenizer.post_processor,),
    }
    for name, part in parts.items():
        steps = _steps(*part)
        if len(steps) > MAX_STEPS:
            raise ValueError(f"its {name} have {len(steps)} steps, the limit is {MAX_STEPS}")
        if _total_growth(steps) > MAX_GROWTH:
            raise ValueError(
                f"its {name} can make a text more than {MAX_GROWTH} times as long, the limit; use "
                "the tokenizer of a model that you trust"
            )
        num_added = sum(map(_added_tokens, steps))
        if num_added > MAX_ADDED_TOKENS:
            raise ValueError(
                f"its {name} adds {num_added} tokens to a text, the limit is {MAX_ADDED_TOKENS}"
            )


def text_growth(tokenizer: Tokenizer) -> int:
    """Return how many times as many bytes a text may have when it is divided into tokens."""
    return _total_growth(_steps(tokenizer.normalizer, tokenizer.pre_tokenizer))


def _steps(*parts: Any) -> list[Mapping[str, Any]]:
    """Return the steps of parts, those of nested sequences one by one."""
    waiting = [json.loads(part.__getstate__()) for part in reversed(parts) if part is not None]
    steps: list[Mapping[str, Any]] = []
    while waiting:
        step = waiting.pop()
        if step["type"] == "Sequence":
            waiting += reversed(next(step[name] for name in _SEQUENCES if name in step))
        else:
            steps.append(step)
    return steps


def _total_growth(steps: Sequence[Mapping[str, Any]]) -> int:
    tables = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return math.prod(map(_growth, steps)) * _table_growth(tables)


def _growth(step: Mapping[str, Any]) -> int:
    """Return how many times as many bytes a step makes of a text, at most."""
    match step["type"]:
        case "Replace":
            content, pattern = step["content"].encode(), step["pattern"].get("String", "").encode()
            if pattern:
                return max(1, math.ceil(len(content) / len(pattern)))
            return 1 + len(content)  # a regular expression, which may match between characters
        case "Prepend":
            return 1 + len(step["prepend"].encode())
        case "Metaspace":
            return 1 + len(step["replacement"].encode())  # before each word
        case "ByteLevel":
            return 2 + bool(step.get("add_prefix_space"))
        case "BertNormalizer":
            return 2  # spaces around Chinese characters
        case "TemplateProcessing":
            return max(1, sum("Sequence" in piece for piece in step["single"]))
    return 1


def _added_tokens(step: Mapping[str, Any]) -> int:
    """Return how many tokens a step adds to a text of any length."""
    if step["type"] != "TemplateProcessing":
        return 0
    counts = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    pieces = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
    return sum(counts[piece] for piece in pieces)


def _table_growth(tables: Sequence[str]) -> int:
    """Return the same of the tables of SentencePiece, of which one may be Unicode's."""
    lengths = [_longest_entry(table) for table in tables]
    is_unicode = len(lengths) <= 1 and max(lengths, default=0) <= _MAX_CHARACTER_BYTES
    return 1 if is_unicode else math.prod(max(1, length) for length in lengths)


def _longest_entry(table: str) -> int:
    """Return the most bytes of an entry: a trie, whose size comes first, then texts with NUL."""
    try:
        content = base64.b64decode(table)
    except binascii.Error as error:
        raise ValueError("its table of characters is no base64") from error
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(map(len, texts.split(b"\0")))
