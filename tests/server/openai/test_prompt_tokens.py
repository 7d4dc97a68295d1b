"""The tokens of a prompt: truncated prompts, and tokens that the tokenizer adds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import processors

from nanovllm import LLM, SamplingParams
from tests.support.checkpoints import END_OF_TEXT, write_tiny_model
from tests.support.serving import (
    ENGINE_SETTINGS,
    RunningServer,
    loader,
)

# The end of a prompt ------------------------------------------------------------------------------

LONG = "in the café: 漢字 and then the end of the word, on the way in"


@pytest.mark.parametrize("kept", [1, 2, 7, 20, 44, 45, 128])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_a_truncated_prompt_is_the_prompt_of_its_last_tokens(
    server: RunningServer, llm: LLM, kept: int, form: str
) -> None:
    ids = llm.tokenizer.encode(LONG)
    assert 40 < len(ids) < 70
    settings = {
        "max_tokens": 6, "temperature": 0, "echo": True, "logprobs": 2, "prompt_logprobs": 1,
        "return_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    cut = server.complete(LONG if form == "text" else ids, truncate_prompt_tokens=kept, **settings)
    sent = server.complete(ids[-kept:], **settings)
    assert cut["choices"] == sent["choices"]
    assert (
        cut["usage"]["prompt_tokens"]
        == min(kept, len(ids))
        == len(cut["choices"][0]["prompt_token_ids"])
    )
    (output,) = llm.generate(
        [LONG if form == "text" else ids],
        SamplingParams(max_tokens=0, truncate_prompt_tokens=kept),
        use_tqdm=False,
    )
    assert output.prompt_token_ids == ids[-kept:]
    text = llm.tokenizer.decode(ids[-kept:])
    assert output.prompt == (text if form == "text" else None)
    assert cut["choices"][0]["text"].startswith(text)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["text", "ids"])
def test_vllm_truncation_side(server: RunningServer, llm: LLM, side: str, form: str) -> None:
    ids = llm.tokenizer.encode(LONG)
    body = server.complete(
        LONG if form == "text" else ids,
        truncate_prompt_tokens=5,
        truncation_side=side,
        max_tokens=1,
        return_token_ids=True,
    )
    kept = ids[-5:] if side == "left" else ids[:5]
    assert body["choices"][0]["prompt_token_ids"] == kept
    assert body["usage"]["prompt_tokens"] == 5
    error = server.error({"prompt": LONG, "truncate_prompt_tokens": 129})
    assert error["param"] == "truncate_prompt_tokens"
    assert server.error({"prompt": LONG, "truncation_side": "end"})["param"] == "truncation_side"


def test_minus_1_keeps_what_fits_with_the_answer(server: RunningServer, llm: LLM) -> None:
    prompt = [5, 6, 7] * 100
    body = server.complete(
        prompt,
        truncate_prompt_tokens=-1,
        max_tokens=30,
        ignore_eos=True,
        temperature=0,
        return_token_ids=True,
    )
    assert body["choices"][0]["prompt_token_ids"] == prompt[-(128 - 30) :]
    assert body["usage"]["total_tokens"] == 128
    assert server.complete(prompt, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 128 - 16
    assert (
        server.complete("the end", truncate_prompt_tokens=-1, max_tokens=1)["usage"][
            "prompt_tokens"
        ]
        == 5
    )
    assert (
        server.complete(prompt, truncate_prompt_tokens=-1, max_tokens=0, echo=True)["usage"][
            "prompt_tokens"
        ]
        == 128
    )
    (output,) = llm.generate(
        [prompt], SamplingParams(max_tokens=30, truncate_prompt_tokens=-1), use_tqdm=False
    )
    assert len(output.prompt_token_ids) == 98
    error = server.error({"prompt": prompt, "truncate_prompt_tokens": -1, "max_tokens": 128})
    assert error["param"] == "max_tokens"
    assert "128" in error["message"]


def test_a_truncated_prompt_must_still_fit(server: RunningServer) -> None:
    error = server.error({"prompt": [1] * 300, "truncate_prompt_tokens": 120, "max_tokens": 9})
    assert error["param"] == "max_tokens"
    assert "129" in error["message"]


def test_a_text_longer_than_the_context_may_be_truncated(server: RunningServer, llm: LLM) -> None:
    text = "the end of " * 5000
    server.error({"prompt": text})
    body = server.complete(text, truncate_prompt_tokens=10, max_tokens=1, return_token_ids=True)
    assert body["choices"][0]["prompt_token_ids"] == llm.tokenizer.encode("the end of " * 20)[-10:]
    error = server.error({"prompt": "x" * (1 << 18) + "x", "truncate_prompt_tokens": 10})
    assert error["param"] == "prompt"
    assert str(1 << 18) in error["message"]


def test_what_is_cut_off_is_checked_too(server: RunningServer) -> None:
    assert (
        "0 to 266" in server.error({"prompt": [267, 1, 2], "truncate_prompt_tokens": 1})["message"]
    )


# Special tokens -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opening_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts end-of-text in front of every text."""
    folder = write_tiny_model(tmp_path_factory.mktemp("opening-model"))
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    special = (END_OF_TEXT, library.token_to_id(END_OF_TEXT))
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[special]
    )
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def opening_server(opening_model: Path, backend: str) -> Iterator[RunningServer]:
    with RunningServer(loader(opening_model)) as running:
        yield running


def prompt_ids(server: RunningServer, prompt: Any, **settings: Any) -> list[int]:
    ids: list[int] = server.complete(prompt, max_tokens=1, return_token_ids=True, **settings)[
        "choices"
    ][0]["prompt_token_ids"]
    return ids


def test_gpt2s_tokenizer_adds_none(server: RunningServer, llm: LLM) -> None:
    for add in (True, False):
        assert prompt_ids(server, "the end", add_special_tokens=add) == llm.tokenizer.encode(
            "the end"
        )


def test_those_of_another_tokenizer_are_added_or_not(
    opening_server: RunningServer, opening_model: Path, llm: LLM, backend: str
) -> None:
    plain, end = llm.tokenizer.encode("the end"), llm.engine.model.eos_token_ids[0]
    assert (
        prompt_ids(opening_server, "the end")
        == prompt_ids(opening_server, "the end", add_special_tokens=True)
        == [end, *plain]
    )
    assert prompt_ids(opening_server, "the end", add_special_tokens=False) == plain
    assert prompt_ids(opening_server, plain, add_special_tokens=True) == plain, (
        "token ids are taken as they are"
    )
    kept = [end, *plain[1:]]  # the tokens around a text stay, and count
    assert prompt_ids(opening_server, "the end", truncate_prompt_tokens=len(plain)) == kept
    opening = LLM(opening_model, **ENGINE_SETTINGS)
    for add in (True, False):
        (output,) = opening.generate(
            "the end", SamplingParams(max_tokens=1, add_special_tokens=add), use_tqdm=False
        )
        assert (output.prompt, output.prompt_token_ids) == (
            "the end",
            [end, *plain] if add else plain,
        )


def test_an_echo_has_the_text_without_them_and_offsets_point_into_it(
    opening_server: RunningServer,
) -> None:
    (choice,) = opening_server.complete("the end", echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["text"] == "the end"
    assert choice["logprobs"]["tokens"] == [END_OF_TEXT, "the", " ", "e", "n", "d"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 4, 5, 6]
