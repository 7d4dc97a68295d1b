"""LLM as people of vLLM and NumPy use it: arrays, iterables, chat, streams, close, errors."""

import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nanovllm
from nanovllm import LLM, EngineNotReadyError, InvalidRequestError, SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.engine.sandbox.process import WorkerProcess
from nanovllm.engine.step_output import StepOutput
from tests.support.checkpoints import write_tiny_model
from tests.support.serving import TIMEOUT_S, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SETTINGS: dict[str, Any] = {"backend": "numpy", "kv_cache_memory": "4MiB", "block_size": 8}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [{"role": "user", "content": "the end"}]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, **SETTINGS) as opened:
        yield opened


def texts(llm: LLM, prompts: Any) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


# Prompts and settings ---------------------------------------------------------------------------


def test_token_ids_may_be_numpys(llm: LLM) -> None:
    expected = texts(llm, [[5, 6, 7]])
    ids = np.array([5, 6, 7])
    for prompt in (ids, ids.astype(np.uint16), list(ids), {"prompt_token_ids": ids}, ids[None]):
        assert texts(llm, prompt) == expected
    (output,) = llm.generate(ids, GREEDY, use_tqdm=False)
    assert all(type(token_id) is int for token_id in output.prompt_token_ids)
    assert llm.embed(ids, use_tqdm=False)[0].prompt_token_ids == [5, 6, 7]
    with pytest.raises(InvalidRequestError, match=r"has 5.0 among its token ids"):
        texts(llm, {"prompt_token_ids": ids.astype(np.float32)})
    with pytest.raises(InvalidRequestError, match="has a list among its token ids"):
        texts(llm, {"prompt_token_ids": ids[None]})


def test_prompts_and_their_settings_may_be_any_iterable(llm: LLM) -> None:
    words = ("the", "a", "in")
    assert texts(llm, (word for word in words)) == texts(llm, list(words))
    params = (GREEDY.clone(max_tokens=count) for count in (1, 2, 3))
    outputs = llm.generate(map(str, words), params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]


def test_the_tokenizer_reads_and_writes(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("the end")
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode(np.array(ids)) == "the end"


def test_dtype_auto_is_the_type_of_the_file(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, dtype="BF16")
    llm = LLM(tmp_path, dtype="auto", num_threads=1, kv_cache_memory="1MiB")
    assert llm.engine.config.dtype == llm.engine.runner.backend.weight_dtype == "bfloat16"
    assert LLM(tmp_path, dtype="auto", **SETTINGS).engine.config.dtype == "float32"


# Chat ---------------------------------------------------------------------------------------------


def test_chat_is_the_completion_of_the_rendered_messages(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    end = tokenizer.special_tokens["<|endoftext|>"]
    ids = [*tokenizer.encode("user: the end"), end, *tokenizer.encode("assistant:")]
    (expected,) = llm.generate(ids, GREEDY, use_tqdm=False)
    one, other = llm.chat([TALK, TALK], GREEDY, use_tqdm=False, chat_template=TEMPLATE)
    assert one.prompt_token_ids == ids
    assert one.prompt == "user: the end<|endoftext|>assistant:"
    assert one.outputs == other.outputs == expected.outputs
    pieces = [
        part.outputs[0].text for part in llm.stream_chat(TALK, GREEDY, chat_template=TEMPLATE)
    ]
    assert "".join(pieces) == expected.outputs[0].text


def test_the_end_of_a_turn_ends_the_answer(tmp_path: Path) -> None:
    """The template's end of a turn, which config.json does not call the end of text."""
    with LLM(write_tiny_model(tmp_path, config={"eos_token_id": 3}), **SETTINGS) as llm:
        end = llm.tokenizer.special_tokens["<|endoftext|>"]
        params = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100.0})
        (output,) = llm.chat(TALK, params, use_tqdm=False, chat_template=TEMPLATE)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("", end)
        on = params.clone(ignore_eos=True)
        (output,) = llm.chat(TALK, on, use_tqdm=False, chat_template=TEMPLATE)
        assert output.outputs[0].finish_reason == "length"


def test_chat_takes_the_models_own_template_or_that_of_a_file(tmp_path: Path, llm: LLM) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    (expected,) = llm.chat(TALK, GREEDY, use_tqdm=False, chat_template=file)
    model = write_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with LLM(model, **SETTINGS) as own:
        assert own.chat(TALK, GREEDY, use_tqdm=False)[0].outputs == expected.outputs
    (plain,) = llm.chat(TALK, GREEDY, use_tqdm=False, chat_template="plain")
    assert plain.prompt is not None
    assert plain.prompt.endswith("User: the end\nAssistant:")


def test_the_last_message_can_be_continued(llm: LLM) -> None:
    begun = [*TALK, {"role": "assistant", "content": "the"}]
    options: Any = {"chat_template": TEMPLATE, "add_generation_prompt": False}
    (whole,) = llm.chat(begun, GREEDY, use_tqdm=False, **options)
    (output,) = llm.chat(begun, GREEDY, use_tqdm=False, continue_final_message=True, **options)
    assert output.prompt == "user: the end<|endoftext|>assistant: the"
    assert whole.prompt == output.prompt + "<|endoftext|>"
    (*_, last) = llm.stream_chat(begun, GREEDY, continue_final_message=True, **options)
    assert last.prompt_token_ids == output.prompt_token_ids
    with pytest.raises(InvalidRequestError, match="cannot both be true"):
        llm.chat(begun, GREEDY, chat_template=TEMPLATE, continue_final_message=True)


def test_a_chat_that_cannot_be_says_why(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="has no chat template; pass chat_template"):
        llm.chat(TALK, GREEDY)
    with pytest.raises(
        nanovllm.CheckpointError, match=r"chat template \(passed as text\) is not valid"
    ):
        llm.chat(TALK, GREEDY, chat_template="{% if %}")
    with pytest.raises(InvalidRequestError, match=r"pathlib\.Path"):
        llm.chat(TALK, GREEDY, chat_template="templates/chat.jinja")
    with pytest.raises(InvalidRequestError, match="2 conversations, a stream takes one"):
        llm.stream_chat([TALK, TALK], chat_template=TEMPLATE)  # type: ignore[list-item]
    assert not llm.engine.has_work


# Streams ------------------------------------------------------------------------------------------


def test_a_stream_adds_up_to_the_whole_answer(llm: LLM) -> None:
    params = GREEDY.clone(n=2, temperature=0.9, seed=3, logprobs=1, max_tokens=12, stop="e")
    (whole,) = llm.generate("the hen", params, use_tqdm=False)
    parts = list(llm.stream("the hen", params))
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    for index, answer in enumerate(whole.outputs):
        mine = [one for part in parts for one in part.outputs if one.index == index]
        assert "".join(one.text for one in mine) == answer.text
        assert [token for one in mine for token in one.token_ids] == answer.token_ids
        assert [one for part in mine for one in part.logprobs or ()] == answer.logprobs
        assert (mine[-1].finish_reason, mine[-1].stop_reason) == (
            answer.finish_reason,
            answer.stop_reason,
        )


def test_leaving_a_stream_aborts_its_request_alone(llm: LLM) -> None:
    long = GREEDY.clone(max_tokens=30)
    (expected,) = llm.generate("the", long, use_tqdm=False)
    kept, left = llm.stream("the", long), llm.stream("a", long)
    text = next(kept).outputs[0].text
    next(left)
    left.close()
    assert llm.engine.stats().num_requests_running <= 1
    assert text + "".join(part.outputs[0].text for part in kept) == expected.outputs[0].text
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_a_stream_that_is_never_begun_costs_nothing(llm: LLM) -> None:
    stream = llm.stream("the", GREEDY)
    assert not llm.engine.has_work
    stream.close()
    assert texts(llm, "the")


def test_a_stream_that_the_worker_collects_ends_like_another(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generator may be part of a cycle; closing it there must not wait for the worker."""
    (expected,) = texts(llm, "the")
    step, held = llm.engine.step, [llm.stream("a", GREEDY.clone(max_tokens=100))]
    next(held[0])

    def stepping() -> StepOutput:
        held.clear()
        return step()

    monkeypatch.setattr(llm.engine, "step", stepping)
    assert texts(llm, "the") == [expected]
    wait_until(lambda: not llm.engine.has_work)
    llm.engine.check_integrity()


def test_a_stream_that_is_collected_anywhere_ends_like_another(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may close it in a thread that is just starting another call."""
    step, is_collected = llm.engine.step, threading.Event()
    stream = llm.stream("a", GREEDY.clone(max_tokens=100))

    def stepping() -> StepOutput:
        output = step()
        if output.stats.num_decode_tokens > 0:
            is_collected.wait(TIMEOUT_S)
        return output

    monkeypatch.setattr(llm.engine, "step", stepping)
    next(stream)

    def collect() -> None:
        with llm._calls._lock:  # noqa: SLF001 - has no other name
            is_collected.set()
            stream.close()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    wait_until(lambda: not llm.engine.has_work)
    llm.engine.check_integrity()


def test_a_wrong_stream_raises_at_the_call_and_a_fault_in_the_loop(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        llm.stream("")

    def fail(*arguments: object) -> None:
        raise RuntimeError("the kernel fell over")

    stream = llm.stream("the", GREEDY.clone(n=2, temperature=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", fail)
        with pytest.raises(nanovllm.EngineFaultError):
            list(stream)
    assert not llm.engine.has_work
    assert (
        "".join(part.outputs[0].text for part in llm.stream("the", GREEDY)) == texts(llm, "the")[0]
    )


def test_where_no_thread_can_be_had_a_stream_comes_from_the_caller(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = texts(llm, "the")

    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert "".join(part.outputs[0].text for part in llm.stream("the", GREEDY)) == expected


# Closing ------------------------------------------------------------------------------------------


def test_a_closed_llm_says_so(tiny_model: Path) -> None:
    with LLM(tiny_model, **SETTINGS) as llm:
        stream = llm.stream("the", GREEDY.clone(max_tokens=100))
        next(stream)
        begun = llm.stream("the", GREEDY)
    llm.close()
    assert repr(llm) == f"LLM({str(tiny_model)!r}, closed)"
    calls: list[Callable[[], object]] = [
        lambda: llm.generate("the", GREEDY),
        lambda: llm.embed("the"),
        lambda: llm.chat(TALK, GREEDY, chat_template=TEMPLATE),
        lambda: llm.stream("the"),
        lambda: list(begun),
        lambda: list(stream),
        llm.get_tokenizer,
    ]
    for call in calls:
        with pytest.raises(EngineNotReadyError, match="this LLM is closed; make another one"):
            call()


def test_a_closed_llm_has_no_process_that_renders_chats(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[WorkerProcess] = []

    def starting(*arguments: Any) -> WorkerProcess:
        started.append(WorkerProcess(*arguments))
        return started[-1]

    monkeypatch.setattr("nanovllm.engine.sandbox.process_pool.WorkerProcess", starting)
    with LLM(tiny_model, **SETTINGS) as llm:
        llm.chat(TALK, GREEDY, use_tqdm=False, chat_template=TEMPLATE)
        assert [process.is_running for process in started] == [True]
    with pytest.raises(EngineNotReadyError, match="this LLM is closed"):
        llm.chat(TALK, GREEDY, chat_template=TEMPLATE)
    (process,) = started
    assert not process.is_running


def test_a_closed_llm_keeps_no_engine(tiny_model: Path) -> None:
    llm = LLM(tiny_model, **SETTINGS)
    engine = llm.engine
    llm.close()
    held = [
        one for one in gc.get_referrers(engine) if isinstance(one, dict) and one is not locals()
    ]
    assert not held
    assert isinstance(engine, Engine)


# What people see ---------------------------------------------------------------------------------


def test_an_llm_shows_what_it_is(llm: LLM, tiny_model: Path) -> None:
    assert repr(llm) == (
        f"LLM({str(tiny_model)!r}, dtype='float32', backend='numpy', max_model_len=128, "
        f"num_parameters={llm.engine.model.num_parameters})"
    )


def test_an_error_has_one_traceback(llm: LLM, tmp_path: Path) -> None:
    """A chain of causes that say the same is longer, and no clearer."""
    (tmp_path / "config.json").write_text("{")
    calls: list[Callable[[], object]] = [
        lambda: llm.generate(["good", ""], GREEDY),
        lambda: llm.generate(["good", "the " * 1000], GREEDY),
        lambda: llm.embed(["good", [10**6]]),
        lambda: llm.chat([TALK, []], chat_template=TEMPLATE),
        lambda: llm.chat([TALK, [{"role": "x", "content": ""}]], chat_template=TEMPLATE),
        lambda: llm.chat(TALK, chat_template="{% if %}"),
        lambda: llm.chat(TALK, chat_template="{{ raise_exception('no') }}"),
        lambda: llm.generate(
            "the", GREEDY.clone(structured_outputs=nanovllm.StructuredOutputs(regex="("))
        ),
        lambda: SamplingParams(temperature="hot"),  # type: ignore[arg-type]
        lambda: LLM(tmp_path),
        lambda: LLM(tmp_path / "nowhere"),
        lambda: LLM(dtype="flot32"),  # type: ignore[arg-type]
        lambda: LLM(gpu_memory_utilization=1),  # type: ignore[call-arg]
    ]
    for call in calls:
        with pytest.raises((nanovllm.NanovllmError, ValueError, TypeError)) as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value))
        assert shown.count("Traceback (most recent call last)") == 1, shown
