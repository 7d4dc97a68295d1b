"""README.md works when pasted: its Python runs, its results are real, its targets exist."""

import json
import re
from pathlib import Path

import pytest

from nanovllm import LLM

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
MAX_LINES = 180
FIRST_SCREEN_LINES = 20


def test_it_is_short_and_begins_with_both_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= MAX_LINES
    first_screen = "\n".join(lines[:FIRST_SCREEN_LINES])
    assert "\nmake serve " in first_screen
    assert "\nmake test " in first_screen


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process, so that the kernels load once; test_samples.py checks the types."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    shown = re.search(re.escape(code) + r"```\n\n```text\n(.*?)\n```", README, re.DOTALL)
    assert shown
    assert capsys.readouterr().out == shown[1]


def test_the_completion_is_the_one_that_is_shown() -> None:
    (body,) = re.findall(r"-d '(.*?)'", README)
    shown = json.loads(next(code for language, code in BLOCKS if language == "json"))
    request = json.loads(body)
    prompt = request.pop("prompt")
    llm = LLM()
    (output,) = llm.generate(prompt, llm.default_sampling_params().clone(**request))
    (choice,) = shown["choices"]
    assert output.outputs[0].text == choice["text"]
    assert output.outputs[0].finish_reason == choice["finish_reason"]
    assert shown["usage"]["prompt_tokens"] == len(output.prompt_token_ids)


def test_the_ratios_are_those_of_the_measurements() -> None:
    page = (ROOT / "docs" / "maintainers" / "measurements.md").read_text(encoding="utf-8")
    table = page.partition("<!-- compare: begin -->")[2].partition("<!-- compare: end -->")[0]
    measured = {
        kind: re.findall(r"\*\*([\d.]+)\*\*", cells)
        for kind, cells in re.findall(r"^\| ratio, (\w+) \|(.*)$", table, re.MULTILINE)
    }
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert {kind: list(ratios) for kind, *ratios in rows} == measured
