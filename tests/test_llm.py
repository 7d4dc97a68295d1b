"""LLM: the Python face, on the tiny and on the bundled model."""

import inspect
import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineConfig, SamplingParams
from nanovllm.config import BackendName
from nanovllm.errors import InvalidRequestError
from nanovllm.prompts import Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(tiny_model: Path, backend: BackendName) -> LLM:
    return LLM(
        tiny_model, backend=backend, kv_cache_memory="4MiB", block_size=8, batch_invariant=True
    )


@pytest.fixture(scope="module")
def books(backend: BackendName) -> LLM:
    return LLM(backend=backend, kv_cache_memory="32MiB")


def test_the_bundled_model_writes_words(books: LLM) -> None:
    output = books.generate(
        "Once upon a time", SamplingParams(temperature=0, max_tokens=24), use_tqdm=False
    )[0]
    answer = output.outputs[0]
    assert output.prompt == "Once upon a time"
    assert books.tokenizer.decode(output.prompt_token_ids) == output.prompt
    assert len(answer.token_ids) == 24
    assert answer.text == books.tokenizer.decode(answer.token_ids)
    assert sum(word.strip('.,;"').isalpha() for word in answer.text.split()) >= 10


def test_everything_the_readme_promises_of_an_output(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.8,
        top_p=0.95,
        max_tokens=6,
        logprobs=2,
        prompt_logprobs=1,
        seed=7,
        ignore_eos=True,
    )
    prompts: list[Prompt] = ["the hen", {"prompt_token_ids": [1, 2, 3]}]
    text, ids = llm.generate(prompts, params, use_tqdm=False)
    assert (text.prompt, ids.prompt, ids.prompt_token_ids) == ("the hen", None, [1, 2, 3])
    for output in (text, ids):
        answer = output.outputs[0]
        assert output.finished
        assert (answer.index, answer.finish_reason, answer.stop_reason) == (0, "length", None)
        assert output.prompt_logprobs is not None
        assert answer.logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        assert all(
            position and token in position
            for position, token in zip(
                output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
            )
        )
        assert [2 <= len(position) <= 3 for position in answer.logprobs] == [True] * 6
        chosen = [
            position[token]
            for position, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ]
        assert answer.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in chosen))
        assert all(
            entry.decoded_token == llm.tokenizer.token_text(token)
            for entry, token in zip(chosen, answer.token_ids, strict=True)
        )


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Prompts that end at very different times keep their own outputs."""
    prompts = [
        {"prompt_token_ids": [token] * length}
        for token, length in ((5, 40), (6, 3), (7, 25), (8, 1), (9, 60), (10, 2))
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for tokens in (2, 30, 1, 20, 3, 9)
    ]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in together] == [
        prompt["prompt_token_ids"] for prompt in prompts
    ]
    assert [len(output.outputs[0].token_ids) for output in together] == [2, 30, 1, 20, 3, 9]
    for prompt, own, output in zip(prompts, params, together, strict=True):
        assert (
            llm.generate(prompt, own, use_tqdm=False)[0].outputs[0].token_ids
            == output.outputs[0].token_ids
        )


def test_n_answers_come_in_order(llm: LLM) -> None:
    output = llm.generate(
        "the", SamplingParams(n=4, max_tokens=8, seed=3, ignore_eos=True), use_tqdm=False
    )[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1


def test_the_best_of_more_answers_come_best_first(llm: LLM) -> None:
    settings: dict[str, Any] = {"max_tokens": 10, "seed": 3, "stop_token_ids": range(0, 60, 2)}
    every = llm.generate("the", SamplingParams(n=6, logprobs=0, **settings), use_tqdm=False)[0]
    best = llm.generate("the", SamplingParams(n=2, best_of=6, **settings), use_tqdm=False)[0]
    ranked = sorted(
        every.outputs,
        key=lambda answer: (answer.cumulative_logprob or 0) / len(answer.token_ids),
        reverse=True,
    )
    assert [answer.token_ids for answer in best.outputs] == [
        answer.token_ids for answer in ranked[:2]
    ]
    assert [
        (answer.index, answer.logprobs, answer.cumulative_logprob) for answer in best.outputs
    ] == [(0, None, None), (1, None, None)]
    assert (
        best.num_generated_tokens
        == every.num_generated_tokens
        == sum(len(answer.token_ids) for answer in every.outputs)
    )


def test_stop_strings_end_the_text_before_them(books: LLM) -> None:
    whole = books.generate(
        "It was a dark", SamplingParams(temperature=0, max_tokens=60), use_tqdm=False
    )[0].outputs[0]
    stop = whole.text[20:23]
    cut = books.generate(
        "It was a dark",
        SamplingParams(temperature=0, max_tokens=60, stop=[stop, "never there"]),
        use_tqdm=False,
    )[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    kept = SamplingParams(temperature=0, max_tokens=60, stop=stop, include_stop_str_in_output=True)
    assert (
        books.generate("It was a dark", kept, use_tqdm=False)[0].outputs[0].text == cut.text + stop
    )


def test_stop_tokens_and_end_of_text(llm: LLM) -> None:
    free = llm.generate(
        "the", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False
    )[0].outputs[0]
    token = free.token_ids[3]
    first = free.token_ids.index(token)
    stopped = llm.generate(
        "the",
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[token]),
        use_tqdm=False,
    )[0].outputs[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert stopped.text == llm.tokenizer.decode(free.token_ids[:first])
    (end,) = llm.engine.model.eos_token_ids
    forced = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100.0})
    ended = llm.generate("the", forced, use_tqdm=False)[0].outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == (
        [end],
        "",
        "stop",
        None,
    )
    going_on = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100.0}, ignore_eos=True)
    assert llm.generate("the", going_on, use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_max_tokens_none_goes_on_to_the_end_of_the_context(llm: LLM) -> None:
    output = llm.generate(
        "the", SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False
    )[0]
    assert (
        len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == llm.engine.max_model_len
    )
    assert output.outputs[0].finish_reason == "length"


def test_settings_each_prompt_has_of_its_own(llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=3),
        SamplingParams(temperature=1.5, seed=1, max_tokens=7, ignore_eos=True),
    ]
    outputs = llm.generate(["the", "the"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 7]
    with pytest.raises(InvalidRequestError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], params[:1])


def test_llm_has_the_settings_of_engine_config_with_their_defaults() -> None:
    parameters = dict(inspect.signature(LLM).parameters)
    del parameters["model"]
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        field.name: field.default for field in fields(EngineConfig)
    }


def test_the_progress_bar_counts_prompts_and_shows_both_rates(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, silent = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    llm.generate(["the", "a", "in"], GREEDY)
    shown = screen.getvalue()
    assert "3/3" in shown
    assert "prefill" in shown
    assert "decode" in shown
    monkeypatch.setattr("sys.stderr", silent)
    llm.generate("the", GREEDY)
    assert silent.getvalue() == "", "progress is for terminals only"


def test_defaults_come_from_the_models_generation_config(tmp_path: Path, tiny_model: Path) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.5, "top_k": 7, "do_sample": true, "eos_token_id": [3, 4]}'
    )
    llm = LLM(tmp_path, kv_cache_memory="1MiB")
    params = llm.default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 1.0)
    assert {3, 4} < set(llm.engine.model.eos_token_ids)
    assert len(llm.generate("the", use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_embeddings_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts: list[Prompt] = ["the hen", {"prompt_token_ids": [1, 2, 3]}, [5] * 100, {"prompt": "a"}]
    for pooling in ("last", "mean"):
        together = llm.embed(prompts, pooling, use_tqdm=False)
        assert [output.prompt for output in together] == ["the hen", None, None, "a"]
        assert [len(output.prompt_token_ids) for output in together][1:] == [3, 100, 1]
        for prompt, output in zip(prompts, together, strict=True):
            assert output.finished
            assert output.metrics is not None
            assert len(output.outputs.embedding) == llm.engine.model.d_model
            assert sum(x * x for x in output.outputs.embedding) == pytest.approx(1.0, abs=1e-6)
            assert llm.embed(prompt, pooling, use_tqdm=False)[0].outputs == output.outputs
    assert (
        llm.embed("the", normalize=False, use_tqdm=False)[0].outputs
        != llm.embed("the", use_tqdm=False)[0].outputs
    )
    assert llm.embed([]) == []


def test_like_texts_have_like_embeddings(books: LLM) -> None:
    texts = [
        "the old man walked to the sea",
        "the old man walked to the shore",
        "1. 2. 3. 4. 5. 6. 7.",
    ]
    near, own, far = (
        output.outputs.embedding for output in books.embed(texts, "mean", use_tqdm=False)
    )

    def cosine(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert cosine(near, own) > cosine(near, far)
