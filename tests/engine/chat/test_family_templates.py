"""Templates in the style of each family: text and token ids as transformers has recorded them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.sandbox.template_worker import Environment, RefusalError
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from tests.reference.chats import CHATS, ENCODED, PIPELINES, template_source
from tests.support.family_tokenizers import FAMILIES

RECORDED = json.loads(
    (Path(__file__).parents[2] / "reference" / "recorded_tokenizers.json").read_text("utf-8")
)["chats"]


@pytest.fixture(scope="module", params=PIPELINES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, ChatTemplate, Tokenizer]]:
    """The name of a template, the template and the tokenizer of its family."""
    name = str(request.param)
    folder = FAMILIES[PIPELINES[name]]().write(tmp_path_factory.mktemp(name))
    (folder / "chat_template.jinja").write_text(template_source(name), encoding="utf-8")
    template = ChatTemplate.load(folder)
    assert template is not None
    yield name, template, Tokenizer.load(folder)
    template.close()


def test_texts_are_those_of_transformers(family: tuple[str, ChatTemplate, Tokenizer]) -> None:
    """All conversations, rendered without a process."""
    name, template, _ = family
    compiled = Environment().from_string(template.source)
    for case, chat in CHATS.items():
        if "continue_final_message" in chat.options:
            continue
        expected = RECORDED[name][case]
        values: dict[str, Any] = {"add_generation_prompt": False, "tools": None, "documents": None}
        values |= {**template.special_tokens, **chat.options, "messages": chat.messages}
        if "error" in expected:
            with pytest.raises(RefusalError, match=expected["error"]):
                compiled.render(values)
        else:
            assert compiled.render(values) == expected["text"], case


def test_token_ids_are_those_of_transformers(family: tuple[str, ChatTemplate, Tokenizer]) -> None:
    """Only names of tokens in messages differ, which remain text here."""
    name, template, tokenizer = family
    for case in ENCODED:
        chat, expected = CHATS[case], RECORDED[name][case]
        end: Any = "generation_prompt" if chat.options else "closed"
        assert template.render(chat.messages, end=end).text == expected["text"]
        ids = template.encode(chat.messages, tokenizer, lambda _: None, end=end)
        if (name, case) == ("qwen2", "reasoning"):  # whose message has `<think>`
            assert tokenizer.decode(ids, skip_special_tokens=False) == expected["text"]
            named = {tokenizer.control_tokens[tag].token_id for tag in ("<think>", "</think>")}
            assert named.isdisjoint(ids)
            assert named.issubset(expected["ids"])
        else:
            assert ids == expected["ids"], case


def test_an_answer_goes_on_as_in_transformers(family: tuple[str, ChatTemplate, Tokenizer]) -> None:
    name, template, _ = family
    rendered = template.render(CHATS["to go on"].messages, end="open")
    assert rendered.text == RECORDED[name]["to go on"]["text"]


def test_a_template_that_refuses_messages_is_the_requests_error(
    family: tuple[str, ChatTemplate, Tokenizer],
) -> None:
    name, template, _ = family
    expected = RECORDED[name]["not in turn"].get("error")
    if expected is None:
        assert template.render(CHATS["not in turn"].messages).text
        return
    with pytest.raises(InvalidRequestError, match=f"refuses the messages: {expected}"):
        template.render(CHATS["not in turn"].messages)
