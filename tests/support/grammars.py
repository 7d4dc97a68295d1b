"""Grammars that take a stack, memory or time without end, as fields of StructuredOutputs.

Also what tests ask of grammars, and of the processes that they run in.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs

_RULES = 300

DEEP_RULES: dict[str, Any] = {
    "grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4500)) + '\nr4500: "a"'
}
"""The library calls itself once a rule: its stack overflows."""

ENDLESS_MULTIPLE: dict[str, Any] = {"json": {"type": "integer", "multipleOf": 9999991}}
"""Compiling it takes gigabytes, and minutes."""

LARGE_MULTIPLE: dict[str, Any] = {"json": {"type": "integer", "multipleOf": 39989}}
"""Compiling it takes some 20 MB."""

AMBIGUOUS: dict[str, Any] = {
    "grammar": "start: s\ns: " + " | ".join(f"s{i} s" for i in range(_RULES)) + ' | ""\n'
    + "\n".join(f"s{i}: /[a-z ]/ | s{(i + 1) % _RULES}" for i in range(_RULES))
}  # fmt: skip
"""A mask takes a dozen seconds."""


def children_of(pid: int) -> list[int]:
    """Running processes whose parent is `pid`, and theirs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == pid and state != "Z":
                found += [int(folder.name), *children_of(int(folder.name))]
    return found


def accepts(grammars: Grammars, tokenizer: Tokenizer, wanted: StructuredOutputs, text: str) -> bool:
    """Return whether an answer may be exactly `text`, by the masks of a worker process."""
    sequence = grammars.compile(wanted).start()
    try:
        for token_id in [*tokenizer.encode(text), grammars.vocab - 1]:
            if not sequence.allowed_mask()[token_id]:
                return False
            sequence.accept(token_id)
    finally:
        sequence.close()
    return True
