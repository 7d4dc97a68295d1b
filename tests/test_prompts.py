"""Prompts in Python: one or several, as text, lists, arrays and other iterables."""

from array import array
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.chat.messages import list_conversations
from nanovllm.errors import InvalidRequestError
from nanovllm.prompts import list_prompts

IDS = np.array([5, 6, 7], dtype=np.int64)
MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "one",
    ["text", [5, 6, 7], (5, 6), [np.int64(5)], IDS, array("i", [5, 6]), range(3), {"prompt": "a"}],
)
def test_one_prompt_is_a_list_of_one(one: Any) -> None:
    (prompt,) = list_prompts(one)
    assert prompt == one if isinstance(one, str | dict) else list(prompt) == list(one)


@pytest.mark.parametrize(
    ("several", "expected"),
    [
        (["a", {"prompt_token_ids": [1]}, [2, 3]], ["a", {"prompt_token_ids": [1]}, [2, 3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ((text for text in ("a", "b")), ["a", "b"]),
        (map(str, range(3)), ["0", "1", "2"]),
        ({"a": 1, "b": 2}.keys(), ["a", "b"]),
        ([], []),
    ],
)
def test_several_prompts_come_from_any_ordered_iterable(
    several: Any, expected: list[object]
) -> None:
    assert list_prompts(several) == expected


@pytest.mark.parametrize("wrong", [3, None, b"bytes", {"a", "b"}, np.int64(3), 2.5])
def test_what_is_no_prompt_is_refused(wrong: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"prompts is a \w+ but must be a prompt or a list"
    ):
        list_prompts(wrong)


def test_one_conversation_and_several() -> None:
    assert list_conversations([MESSAGE]) == [[MESSAGE]]
    assert list_conversations(iter([[MESSAGE], (MESSAGE, MESSAGE)])) == [[MESSAGE], [MESSAGE] * 2]


def test_a_message_of_an_answer_can_be_sent_back() -> None:
    """Null, empty and unused keys are removed; text parts are joined."""
    answer: dict[str, object] = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "tool_calls": [],
        "audio": None,
    }
    parts: dict[str, object] = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    named: dict[str, object] = {**MESSAGE, "name": "Ann"}
    assert list_conversations([answer, parts, named]) == [
        [
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "a\nb"},
            named,
        ]
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages is a str"),
        (MESSAGE, "messages is a dict"),
        (7, "messages is a int"),
        ([], "there are no messages"),
        ([[]], "there are no messages"),
        (["hello"], "a conversation is a str"),
        ([MESSAGE, "hello"], "message 1 is a str"),
        ([{"content": "hi"}], "message 0 has the role None but must have one of system, developer"),
        ([{"role": "tool", "content": "hi"}], "message 0 has the role 'tool'"),
        ([{"role": "user"}], "message 0 has the content None but must have text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must have text, or a list of"),
        (
            [{**MESSAGE, "tool_calls": [{"id": 1}]}],
            "message 0 has tool_calls, which is not supported",
        ),
        ([{**MESSAGE, "name": 3}], "message 0 has a name that is a int"),
    ],
)
def test_a_wrong_message_is_named(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        list_conversations(messages)
    assert caught.value.param == "messages"
