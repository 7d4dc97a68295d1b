"""`nanovllm generate`: one prompt, several lines, invalid input."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli.main import main
from nanovllm.config import BackendName


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "x", "--temperature", "-1"],
            "temperature is -1.0 but must be a number, from 0.0 to 100.0",
        ),
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
