"""Grammars that exhaust the stack, memory or time, and helpers for grammars and their processes."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from nanovllm.engine.grammar.grammar import Grammars, RequestGrammar, SequenceGrammar
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs

_RULES = 300

DEEP_RULES: dict[str, Any] = {
    "grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4500)) + '\nr4500: "a"'
}
"""The library recurses once per rule, and overflows its stack."""

ENDLESS_MULTIPLE: dict[str, Any] = {"json": {"type": "integer", "multipleOf": 9999991}}
"""Compiling takes gigabytes and minutes."""

LARGE_MULTIPLE: dict[str, Any] = {"json": {"type": "integer", "multipleOf": 39989}}
"""Compiling takes about 20 MB."""

AMBIGUOUS: dict[str, Any] = {
    "grammar": "start: s\ns: " + " | ".join(f"s{i} s" for i in range(_RULES)) + ' | ""\n'
    + "\n".join(f"s{i}: /[a-z ]/ | s{(i + 1) % _RULES}" for i in range(_RULES))
}  # fmt: skip
"""A mask takes about 12 s."""


def children_of(pid: int) -> list[int]:
    """Return the running descendants of a process, each parent before its children."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))

    def descend(parent: int) -> list[int]:
        return [each for child in children.get(parent, []) for each in (child, *descend(child))]

    return descend(pid)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def begun(grammars: Grammars, spec: StructuredOutputs, client: str = "") -> SequenceGrammar:
    """Return a sequence's grammar that is compiled, or waits."""
    grammar = grammars.for_request(spec, client).start()
    grammar.open()
    grammars.poll()
    return grammar


def compiled(grammars: Grammars, spec: StructuredOutputs, client: str = "") -> RequestGrammar:
    """Return a grammar once it is compiled. Raises its error."""
    grammar = grammars.for_request(spec, client)
    first = grammar.start()
    try:
        first.wait()
    finally:
        first.close()
    return grammar


def check_texts(
    grammars: Grammars,
    tokenizer: Tokenizer,
    spec: StructuredOutputs,
    allowed: list[str],
    forbidden: list[str],
) -> None:
    """Assert that a grammar allows some texts, and does not allow others."""
    assert [text for text in allowed if not accepts(grammars, tokenizer, spec, text)] == []
    assert [text for text in forbidden if accepts(grammars, tokenizer, spec, text)] == []


def accepts(grammars: Grammars, tokenizer: Tokenizer, spec: StructuredOutputs, text: str) -> bool:
    """Return whether an output may be exactly `text`, by the masks of a worker process."""
    sequence = grammars.for_request(spec).start()
    try:
        for token_id in [*tokenizer.encode(text), grammars.vocab - 1]:
            if not sequence.allowed_mask()[token_id]:
                return False
            sequence.accept(token_id)
    finally:
        sequence.close()
    return True
