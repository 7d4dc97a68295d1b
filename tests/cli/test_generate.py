"""`nanovllm generate`: one prompt, several lines, invalid input."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli.main import main
from nanovllm.cli.writer import ChatWriter, Writer
from nanovllm.config import BackendName, EngineConfig
from nanovllm.engine.chat.prompts import ChatPrompts
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.errors import InvalidRequestError


def test_it_prints_the_prompt_and_the_answer(
    capsys: pytest.CaptureFixture[str], backend: BackendName
) -> None:
    assert (
        main(
            [
                "generate",
                "Once upon a time",
                "--max-tokens",
                "12",
                "--temperature",
                "0",
                "--backend",
                backend,
            ]
        )
        == 0
    )
    expected = (
        LLM(backend=backend)
        .generate("Once upon a time", SamplingParams(max_tokens=12, temperature=0), use_tqdm=False)[
            0
        ]
        .outputs[0]
        .text
    )
    assert capsys.readouterr().out == f"Once upon a time{expected}\n"


def test_the_same_seed_gives_the_same_text(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            main(
                [
                    "generate",
                    "the",
                    "--model",
                    str(tiny_model),
                    "--seed",
                    seed,
                    "--max-tokens",
                    "20",
                    "--ignore-eos",
                ]
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_without_a_prompt_it_answers_each_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n\n" + "x" * 400 + "\nin\n"))
    assert (
        main(
            [
                "generate",
                "--model",
                str(tiny_model),
                "--temperature",
                "0",
                "--max-tokens",
                "4",
                "--ignore-eos",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert [
        line[:2]
        for line in captured.out.replace("\r", "\n").split("\n")
        if line.startswith(("the", "in"))
    ] == ["th", "in"]
    assert "no room for an answer in a context of 128" in captured.err, (
        "a line that is too long is told, and the next one answered"
    )


def test_the_last_completion_is_repeated_and_continued(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    engine = Engine.load(tiny_model, EngineConfig(backend="numpy"))
    writer = Writer(engine, {"temperature": 0, "max_tokens": 4, "ignore_eos": True})
    with pytest.raises(InvalidRequestError, match="type a prompt first"):
        writer.retry()
    writer.answer("the")
    first = capsys.readouterr().out
    writer.extend()
    longer = first.rstrip("\n") + capsys.readouterr().out
    writer.settings["max_tokens"] = 8
    writer.retry()
    assert capsys.readouterr().out == longer
    writer.clear()
    with pytest.raises(InvalidRequestError, match="type a prompt first"):
        writer.extend()
    engine.close()


def test_it_says_that_the_context_ends_the_text(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    engine = Engine.load(tiny_model, EngineConfig(backend="numpy"))
    settings = {"temperature": 0, "ignore_eos": True}
    message = "nanovllm: the text ends at the model's context of 128 tokens\n"
    room = 128 - len(engine.tokenizer.encode("the"))
    for max_tokens, expected in ((room - 1, ""), (room, ""), (room + 1, message), (10**6, message)):
        Writer(engine, {**settings, "max_tokens": max_tokens}).answer("the")
        assert capsys.readouterr().err == expected
    stop = Writer(engine, {**settings, "max_tokens": 10**6})
    stop.answer("the")
    Writer(engine, {**stop.settings, "stop": [stop.text[-1]]}).answer("the")
    assert capsys.readouterr().err == message, "a stop string ends the second text"
    engine.close()


def test_messages_are_answered_by_the_template(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    chat = ["generate", "--model", str(tiny_model), "--temperature", "0", "--max-tokens", "3"]
    assert main([*chat, "--chat"]) == 1
    assert "has no chat template; give --chat-template plain" in capsys.readouterr().err
    plain = ChatTemplate.load(tiny_model, "plain")
    assert plain is not None
    monkeypatch.setattr("sys.stdin", io.StringIO("the\nhen\n" + "x" * 400 + "\n"))
    with LLM(tiny_model) as llm:
        talk: list[dict[str, str]] = []
        answers = []
        for question in ("the", "hen"):
            talk.append({"role": "user", "content": question})
            params = SamplingParams(temperature=0, max_tokens=3)
            (output,) = llm.chat(talk, params, use_tqdm=False, chat_template="plain")
            answers.append(output.outputs[0].text)
            talk.append({"role": "assistant", "content": answers[-1]})
    assert main([*chat, "--chat-template", "plain"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{answer}\n" for answer in answers)
    assert "/clear begins a new conversation" in captured.err


def test_an_answer_is_repeated_and_continued(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    engine = Engine.load(tiny_model, EngineConfig(backend="numpy"))
    template = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}", "test")
    writer = ChatWriter(
        engine,
        {"temperature": 0, "max_tokens": 4},
        chats=ChatPrompts(tiny_model, engine.input_processor),
        template=template,
    )
    with pytest.raises(InvalidRequestError, match="type a prompt first"):
        writer.retry()
    writer.answer("the")
    first = writer.text
    writer.retry()
    assert writer.text == first
    writer.extend()
    assert len(writer.text) > len(first)
    assert writer.text.startswith(first)
    writer.answer("hen")
    assert [message["role"] for message in writer.messages] == ["user", "assistant", "user"]
    writer.clear()
    assert writer.messages == []
    capsys.readouterr()
    template.close()
    engine.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--model", "./not/there"], "not/there"),
        (["generate", "x", "--kv-cache-memory", "much"], "'much' is not a size"),
        (
            ["generate", "x", "--max-num-seqs", "600"],
            "max_num_batched_tokens is 512, less than max_num_seqs (600)",
        ),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("nanovllm: ")
    assert "Traceback" not in captured.err


def test_unknown_flags_and_commands_show_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generate", "x", "--temprature", "1"], ["fly"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: nanovllm" in capsys.readouterr().err


def test_a_reader_that_closes_early_ends_it_quietly(tmp_path: Path) -> None:
    """`nanovllm generate ... | head -c 10` must not end in a traceback."""
    command = [
        sys.executable,
        "-m",
        "nanovllm.cli.main",
        "generate",
        "Once upon a time",
        "--max-tokens",
        "400",
        "--ignore-eos",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in errors
    assert "Broken pipe" not in errors
