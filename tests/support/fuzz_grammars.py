"""Fuzz the compilation of grammars: random schemas, regular expressions and rules.

Some exhaust the stack, memory or time.

    make fuzz                                                  # this too, for a minute
    python -m tests.support.fuzz_grammars --seconds 600        # longer
    python -m tests.support.fuzz_grammars --seed 7             # the same grammars again

Each grammar is compiled or refused with an InvalidRequestError within the limits. Each of its masks
allows a token or fails its sequence with such an error. Masks do not depend on paths. Sequences of
another grammar are not affected. The exit code is 1 otherwise.
"""

import argparse
import itertools
import random
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.engine.grammar.grammar import Grammars, SequenceGrammar
from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.checkpoints import write_tokenizer
from tests.support.grammars import AMBIGUOUS, DEEP_RULES, ENDLESS_MULTIPLE

LIMITS = GrammarLimits(memory_bytes=64 << 20, compile_cpu_s=0.3, mask_cpu_s=0.2)
MAX_TOKENS = 12
MAX_WALL_S = 60.0  # for one grammar, on a machine that has other work

_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object", "nothing")
_PIECES = (
    ".", "a", "[ab]", "[^x]", r"\d", r"\w", r"\s", r"\p{L}", "(", ")", "|", "*", "+", "?",
    "{2}", "{0,300}", "{100000}", "(?=a)", "^", "$", "é", "\\",
)  # fmt: skip


class Fuzzer:
    """Draws random grammars and follows their masks."""

    def __init__(self, grammars: Grammars, seed: int) -> None:
        """Draw grammars by `seed`."""
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._grammars = grammars
        self._bystander: SequenceGrammar | None = None

    def step(self) -> None:
        """Draw a grammar, and check its result. Raises AssertionError."""
        self._follow_bystander()
        fields = self.draw()
        started_s = time.monotonic()
        try:
            self.counts[self._follow(fields)] += 1
        except InvalidRequestError:
            self.counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{error!r} for {fields}") from error
        took_s = time.monotonic() - started_s
        assert took_s < MAX_WALL_S, f"{took_s:.0f} s for {fields}"

    def draw(self) -> dict[str, Any]:
        """Draw the fields of a StructuredOutputs."""
        kinds: list[Callable[[], dict[str, Any]]] = [
            lambda: {"json": self._schema(0)},
            lambda: {"json": self._schema(0)},
            lambda: {"regex": self._regex()},
            lambda: {"grammar": self._rules()},
            lambda: {"grammar": self._gbnf()},
            lambda: {"choice": [self._text() for _ in range(self._random.choice((1, 2, 300)))]},
            self._bomb,
        ]
        return self._random.choices(kinds, weights=[6, 6, 6, 3, 3, 2, 1])[0]()

    def _follow(self, fields: dict[str, Any]) -> str:
        """Follow a grammar, and then a second time without paths."""
        request = self._grammars.for_request(StructuredOutputs(**fields))
        sequence, again = request.start(), request.start()
        steps: list[tuple[bytes, int]] = []
        try:
            end = self._walk(sequence, steps)
            for mask, token_id in steps:
                assert again.wait() == mask, f"{steps}"
                again.accept(token_id)
        finally:
            sequence.close()
            again.close()
        return end

    def _walk(self, sequence: SequenceGrammar, steps: list[tuple[bytes, int]]) -> str:
        """Accept random tokens, often those of paths; add each with the mask before it."""
        sequence.ngram = (1, 2)
        sequence.prompt = self._random.choices(range(self._grammars.vocab), k=100)
        for _ in range(MAX_TOKENS):
            allowed = np.flatnonzero(sequence.allowed_mask())
            if not allowed.size:
                return "dead end"
            token_id = int(self._random.choice(allowed))
            if sequence.path and self._random.random() < 0.8:
                token_id = sequence.path[0]
                assert token_id in allowed
                self.counts["on a path"] += 1
            if token_id == self._grammars.vocab - 1:
                return "finished"
            steps.append((sequence.wait(), token_id))
            limit = self._random.choice((0, 2, 5))
            sequence.accept(token_id)
            sequence.path_limit = limit
        return "followed"

    def _follow_bystander(self) -> None:
        """`[ab]*` allows a, b and the end at every position."""
        if self._bystander is None or self._random.random() < 0.1:
            if self._bystander is not None:
                self._bystander.close()
            spec = StructuredOutputs(regex="[ab]*")
            self._bystander = self._grammars.for_request(spec).start()
        allowed = np.flatnonzero(self._bystander.allowed_mask())
        assert len(allowed) == 3, f"the bystander may go on with {allowed.tolist()}"
        self._bystander.accept(int(allowed[0]))

    def _text(self) -> str:
        letters = string.printable + "é\U0001f600\u0000\ud800"
        return "".join(self._random.choices(letters, k=self._random.choice((1, 3, 40))))

    def _regex(self) -> str:
        return "".join(self._random.choices(_PIECES, k=self._random.choice((2, 6, 30))))

    def _rules(self) -> str:
        draw, count = self._random, self._random.choice((1, 3, 20, 400))
        names = [f"r{i}" for i in range(count)]
        lines = [f"start: {draw.choice(names)}"]
        for name in names:
            items = [*names[:40], '"a"', '"b"i', "/[a-z ]/", "/x*/", '""', "A"]
            parts = draw.choices(items, k=draw.randint(1, 5))
            symbols = [" ", " | ", "* ", "? ", "+ ", "~2..5 "]
            operators = draw.choices(symbols, weights=[4, 4, 1, 1, 1, 1], k=len(parts))
            rule = "".join(part + operator for part, operator in zip(parts, operators, strict=True))
            lines.append(f"{name}: {rule.rstrip('| ')}")
        return "\n".join([*lines, 'A: "a" | "aa"'])

    def _gbnf(self) -> str:
        """Return rules in llama.cpp's notation, some of them not valid."""
        draw, count = self._random, self._random.choice((1, 3, 20, 400))
        rules = [f"r{i}" for i in range(count)]
        pieces = [*rules, '"a"', '"bé"', "[a-z ]", r"[^\x00-\u00ff]", ".", '""', "( a", ")"]
        lines = [
            f"r{i} ::= "
            + "".join(
                draw.choice(pieces) + draw.choice((" ", " ", " | ", "* ", "? ", "+ ", "{2,5} "))
                for _ in range(draw.randint(1, 5))
            )
            for i in range(count)
        ]
        return "\n".join([f"root ::= {draw.choice(pieces)}", *lines])

    def _schema(self, depth: int) -> dict[str, Any]:
        draw = self._random
        number = draw.choice((0, 1, -1, 7, 0.1, 1e308, 10**18, 2**63, 2**64, 99991, 9999991))
        keys: dict[str, Callable[[], object]] = {
            "type": lambda: draw.choice(_TYPES),
            "enum": lambda: [self._text(), number, None],
            "const": lambda: draw.choice((self._text(), number, [1], {})),
            "pattern": self._regex,
            "format": lambda: draw.choice(("date", "uuid", "email", "ipv6", "regex", "x")),
            "multipleOf": lambda: number,
            "minimum": lambda: number,
            "maxLength": lambda: number,
            "minLength": lambda: number,
            "maxItems": lambda: number,
            "$ref": lambda: draw.choice(("#", "#/$defs/a", "http://127.0.0.1:1/x", "file:///etc")),
            "x-guidance": lambda: {"whitespace_flexible": True},
        }
        if depth < 4:
            keys |= {
                "properties": lambda: {
                    self._text(): self._schema(depth + 1) for _ in range(draw.randint(0, 4))
                },
                "items": lambda: self._schema(depth + 1),
                "additionalProperties": lambda: draw.choice((False, self._schema(depth + 1))),
                "anyOf": lambda: [self._schema(depth + 1) for _ in range(draw.randint(0, 3))],
                "allOf": lambda: [self._schema(depth + 1) for _ in range(draw.randint(0, 3))],
                "$defs": lambda: {"a": self._schema(depth + 1)},
            }
        return {key: keys[key]() for key in draw.sample(list(keys), k=draw.randint(0, 4))}

    def _bomb(self) -> dict[str, Any]:
        return dict(self._random.choice((DEEP_RULES, ENDLESS_MULTIPLE, AMBIGUOUS)))


def run(seed: int, *, seconds: float = float("inf"), count: int | None = None) -> Counter[str]:
    """Fuzz for a time or a number of grammars. Return counts of results; raises AssertionError."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_tokenizer(Path(folder))
        grammars = Grammars(Tokenizer.load(Path(folder)), len(names), [len(names) - 1], LIMITS)
    fuzzer = Fuzzer(grammars, seed)
    end_s = time.monotonic() + seconds
    try:
        for number in itertools.count():
            if time.monotonic() > end_s or number == count:
                break
            fuzzer.step()
    finally:
        grammars.close()
    return fuzzer.counts


def main() -> int:
    """Fuzz until the time is over or something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**32), help="draws the same grammars again"
    )
    parsed = parser.parse_args()
    print(f"grammars: seed {parsed.seed}", flush=True)
    counts = run(parsed.seed, seconds=parsed.seconds)
    print(f"grammars: {dict(counts.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
