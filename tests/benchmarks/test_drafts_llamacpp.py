"""llama.cpp with drafts: the same tokens as without, with a context that stands for llama.cpp."""

from typing import Any, cast

import numpy as np
import pytest

from benchmarks.peers.drafts_llamacpp import ModelDrafts, Propose, Speculation, Text
from benchmarks.peers.llamacpp import Context, Item

PROMPTS = [[1, 2, 3], [4, 5], [6]]
LENGTHS = [9, 6, 4]


class FakeContext:
    """A network whose logits are drawn from the last two tokens in its cache."""

    def __init__(self, mistakes: int = 0) -> None:
        self.mistakes = mistakes  # of 4 predictions
        self.cache: dict[int, list[int]] = {}
        self.found: list[Any] = []

    def clear(self) -> None:
        self.cache.clear()

    def cut(self, slot: int, position: int) -> None:
        del self.cache.setdefault(slot, [])[position:]

    def decode(self, items: list[Item]) -> None:
        self.found = []
        for token, position, slot, is_wanted in items:
            known = self.cache.setdefault(slot, [])
            assert position == len(known), "each position follows the cached ones"
            known.append(token)
            logits = np.random.default_rng(known[-2:]).normal(0, 3, 12).astype(np.float32)
            if sum(known) % 4 < self.mistakes:
                logits = -logits
            self.found.append(logits if is_wanted else None)

    def logits(self, place: int) -> Any:
        assert self.found[place] is not None, "its logits were asked for"
        return self.found[place]


def run(propose: Propose | None, temperature: float) -> tuple[list[list[int]], dict[str, Any]]:
    speculation = Speculation(cast("Context", FakeContext()), propose)
    return speculation.generate(PROMPTS, LENGTHS, temperature, seed=7)


def model_drafts(mistakes: int) -> ModelDrafts:
    return ModelDrafts(cast("Context", FakeContext(mistakes)))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mistakes", [0, 2, 4])
def test_a_draft_model_leaves_the_tokens_as_they_are(mistakes: int, temperature: float) -> None:
    plain, without = run(None, temperature)
    drafted, details = run(model_drafts(mistakes), temperature)
    assert drafted == plain
    assert [len(tokens) for tokens in plain] == LENGTHS
    assert (without["drafted"], without["tokens"]) == (0, sum(LENGTHS) - len(LENGTHS))
    assert 0 <= details["accepted"] <= details["drafted"]
    if not temperature:
        expected = {0: details["drafted"], 4: 0}.get(mistakes, details["accepted"])
        assert details["accepted"] == expected


def test_drafts_end_where_the_text_must_end() -> None:
    room: list[int] = []

    def propose(texts: list[Text]) -> list[list[int]]:
        room.extend(text.room for text in texts)
        return [[0] * min(2, text.room) for text in texts]

    assert run(propose, 0.0)[0] == run(None, 0.0)[0]
    assert min(room) == 0
