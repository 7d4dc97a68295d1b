"""The command line: help, suggestions, the model's forms, and imports of `--help`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm.cli.environment import VARIABLES
from nanovllm.cli.generate import model_and_prompt
from nanovllm.cli.main import build_parser, main

ROOT = Path(__file__).parents[2]
QUICK = """
import sys
from nanovllm.cli.main import main
for command in ("", "serve", "generate", "run-batch", "bench serve", "eval", "verify", "download",
                "env"):
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
slow = {"numpy", "numba", "fastapi", "uvicorn", "huggingface_hub", "tokenizers", "tqdm"}
slow &= set(sys.modules)
assert not slow, slow
"""


COMMANDS = (
    "serve", "generate", "run-batch", "train", "train-report", "download", "eval", "verify",
    "bench latency", "bench throughput", "bench threads", "bench profile", "bench serve", "list",
    "show", "remove", "env",
)  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_help_imports_nothing_that_takes_long() -> None:
    ran = run("-c", QUICK)
    assert ran.returncode == 0, ran.stderr


def test_the_package_is_the_command() -> None:
    ran = run("-m", "nanovllm", "serve", "--prot", "1")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines()[-1].startswith("nanovllm serve: error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_function(command: str) -> None:
    required = {
        "run-batch": ["-i", "a", "-o", "b"],
        "remove": ["kernels"],
        "eval": ["--data", "a"],
        "train-report": ["a"],
    }.get(command, [])
    assert callable(build_parser().parse_args([*command.split(), *required]).run)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_environment_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    variables = text.partition("environment variables:\n")[2]
    assert any(variable in variables for variable in VARIABLES) or command == "train-report"
    options = re.split(r"\n(?=  -)", text.partition("\nenvironment")[0])[1:]
    silent = [option for option in options if "default:" not in option]
    names = {option.split()[0].strip(",") for option in silent}
    without_default = {"-h", "-i", "-o", "--model", "--data"}
    if command == "train":
        without_default |= {"--output", "--config", "--resume", "--stop-after"}
        without_default |= {"--preset", "--init-from", "--patience", "--epochs", "--ablate"}
    assert names <= without_default, silent
    help_lines = [re.findall(r"(?m)^ {32}\S|\S {2,}\S", option) for option in options]
    assert max(map(len, help_lines)) <= 2, "a help text has more than two lines"


def test_the_page_has_every_command() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"`{command}`" in page, command


@pytest.mark.parametrize(
    ("line", "usage", "error"),
    [
        ("serve --prot 1", "nanovllm serve [MODEL]", "option --prot; did you mean --port?"),
        ("serve --kv_cache_memory 1G", "nanovllm serve", "did you mean --kv-cache-memory?"),
        ("serve --qqq", "nanovllm serve", "--qqq; nanovllm serve --help lists the options"),
        ("train --n-inner 5", "nanovllm train", "option --n-inner; nanovllm train --help lists"),
        ("train --dtype bf16", "nanovllm train", "option --dtype; nanovllm train --help lists"),
        ("train --layer 3", "nanovllm train", "option --layer; did you mean --layers?"),
        ("bench latency --batch=3", "nanovllm bench latency", "did you mean --batch-size?"),
        ("serv", "nanovllm COMMAND", "there is no command serv; did you mean serve?"),
        ("pull gpt2", "nanovllm COMMAND", "no command pull; did you mean download?"),
        ("run gpt2", "nanovllm COMMAND", "no command run; did you mean generate or serve?"),
        ("bench latenc", "nanovllm bench KIND", "there is no kind latenc; did you mean latency?"),
        ("bench", "nanovllm bench KIND", "throughput, threads, profile or serve"),
        ("visualize", "nanovllm visualize KIND", "name the kind: attention, logit-lens or embed"),
        ("fly", "nanovllm COMMAND", "there is no command fly; choose serve, generate, "),
        ("--port 1 serve", "nanovllm COMMAND", "the options of a command follow it"),
        ("serve --port x", "nanovllm serve", "argument --port: x must be an integer, from 0"),
        ("serve --keep-alive-s inf", "nanovllm serve", "must be a number, from 0.1 to 86400"),
        ("serve --keep-alive-s 1e-9", "nanovllm serve", "must be a number, from 0.1 to 86400"),
        ("bench latency --backend nump", "nanovllm bench latency", "must be numba or numpy; did"),
        ("serve --backend nump", "nanovllm serve", "numpy or learn:DIR; did you mean numpy?"),
        ("serve gpt2 gpt3", "nanovllm serve", "unexpected argument 'gpt3'; put a text with"),
        ("learn show 2 3", "nanovllm learn show", "unexpected argument '3'; it takes one STEP"),
        ("serve gpt2 --model x", "nanovllm serve", "two models are named, gpt2 and x; name one"),
        ("generate x --temperature -1", "nanovllm generate", "-1 must be a number, from 0 to 2"),
        ("generate x --temperature 5", "nanovllm generate", "5 must be a number, from 0 to 2"),
        ("serve --max-num-seqs 0", "nanovllm serve", "0 must be an integer, at least 1"),
        ("serve --log-requests=2", "nanovllm serve", "'2' must be true or false"),
        ("serve --speculative-config ngram", "nanovllm serve", "'ngram' is not JSON"),
        ('generate x --speculative-config {"num_speculative_tokens":1000}', "nanovllm generate",
         "num_speculative_tokens is 1000 but must be an integer, from 1 to 32"),
        ('run-batch --speculative-config {"method":"draft_model"}', "nanovllm run-batch",
         "no model is named; set model"),
        ('bench latency --speculative-config {"speculative_token_tree":1}',
         "nanovllm bench latency", "drafts are sequences, not trees; leave it out"),
    ],
)  # fmt: skip
def test_a_typing_error_is_two_lines(
    capsys: pytest.CaptureFixture[str], line: str, usage: str, error: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"usage: {usage}")
    assert error in lines[1]


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["help"], ["--version"], ["-V"], ["version"], ["help", "serve"]]
)
def test_help_and_version_go_to_standard_output(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert (caught.value.code, captured.err) == (0, "")
    expected = "nanovllm 0." if "ersion" in "".join(arguments) or "-V" in arguments else "usage: "
    assert captured.out.startswith(expected)


@pytest.mark.parametrize("command", ["serve", "verify", "bench latency", "bench throughput",
                                     "bench serve", "run-batch -i a -o b"])  # fmt: skip
@pytest.mark.parametrize("form", ["gpt2", "--model gpt2", "--seed 1 gpt2", "gpt2 --model gpt2"])
def test_every_command_takes_the_model_by_position_and_by_flag(command: str, form: str) -> None:
    assert build_parser().parse_args(f"{command} {form}".split()).model == "gpt2"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ("tiny-books", None)),
        ("Once", ("tiny-books", "Once")),
        ("gpt2", ("tiny-books", "gpt2")),
        ("gpt2 Once", ("gpt2", "Once")),
        ("Once --model gpt2", ("gpt2", "Once")),
        ("--model gpt2", ("gpt2", None)),
    ],
)
def test_generate_takes_a_prompt_and_a_model(
    capsys: pytest.CaptureFixture[str], line: str, expected: tuple[str, str | None]
) -> None:
    assert model_and_prompt(build_parser().parse_args(["generate", *line.split()])) == expected
    hint = "gpt2 is used as the prompt; to name the model: nanovllm generate --model gpt2\n"
    assert capsys.readouterr().err.endswith(hint) == (line == "gpt2")


@pytest.mark.parametrize("line", ["a b c", "a b --model gpt2"])
def test_generate_refuses_a_prompt_without_quotes(
    capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert main(["generate", *line.split()]) == 1
    assert "put a prompt with spaces in quotes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "caching", "invariant"),
    [
        ("", True, False),
        ("--enable-prefix-caching false", False, False),
        ("--enable-prefix-caching=False --batch-invariant true", False, True),
        ("--no-enable-prefix-caching", False, False),
        ("--no-enable-prefix-caching false --batch-invariant false", True, False),
        ("--enable-prefix-caching true --batch-invariant", True, True),
    ],
)
def test_the_value_of_a_switch_is_not_the_model(line: str, caching: bool, invariant: bool) -> None:
    parsed = build_parser().parse_args(["serve", *line.split()])
    assert (parsed.enable_prefix_caching, parsed.batch_invariant) == (caching, invariant)
    assert parsed.model == "tiny-books"


def test_a_switch_leaves_the_model_after_it() -> None:
    parsed = build_parser().parse_args(["serve", "--enable-prefix-caching", "gpt2"])
    assert parsed.model == "gpt2"
    assert build_parser().parse_args(["generate", "--ignore-eos", "--", "true"]).texts == ["true"]
