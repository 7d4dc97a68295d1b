"""Which outputs are written on a worker thread."""

from typing import Any

import pytest

from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.server.openai.renderer import MANY_POSITIONS, TOKENS_PER_POSITION, is_large

MANY = MANY_POSITIONS * TOKENS_PER_POSITION


def output(prompt: int, new: int, *, before: int = 0, choices: int = 1, **fields: Any) -> Any:
    """An output of so many tokens, of which `new` of each choice are in this delta."""
    made = [CompletionOutput(i, "", [1] * new, None, None) for i in range(choices)]
    total = choices * (before + new)
    return RequestOutput("id", None, [1] * prompt, None, made, num_generated_tokens=total, **fields)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([output(500, 16, finished=True)], False),
        ([output(510, 1, finished=True)] * 1000, True),
        ([output(1, MANY + TOKENS_PER_POSITION, finished=True)], True),
        ([output(1, MANY - TOKENS_PER_POSITION, finished=True)], False),
        ([output(500, 1, choices=128)], True),  # each choice's first delta has the prompt
        ([output(500, 1, before=9, choices=128)], False),
    ],
)
def test_prompts_and_token_ids_count(outputs: list[RequestOutput], expected: bool) -> None:
    assert is_large(outputs) is expected
