"""Every program of examples/ runs as it is; in one process, which loads the kernels once."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fastapi.testclient import TestClient

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.hub import resolve_model
from tests.support.serving import RunningServer
from tools import ablation_chart

FOLDER = Path(__file__).parents[2] / "examples"
INDEX = (FOLDER / "README.md").read_text(encoding="utf-8")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run a program as `python examples/NAME ARGUMENTS` does."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server of the bundled model."""
    config = EngineConfig(num_threads=1, kv_cache_memory="64MiB")
    folder = resolve_model("tiny-books")
    with RunningServer(lambda: Engine.load(folder, config), model_names=("tiny-books",)) as running:
        yield running


def test_the_index_lists_every_program() -> None:
    for path in FOLDER.glob("*.py"):
        assert f"[{path.name}]({path.name})" in INDEX


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("batch.py", ["She smiled and said", "The old man looked", "[length]"]),
        ("streaming.py", ["'The old man': 40 tokens", "'In the garden': 40 tokens"]),
        ("chat.py", ["You: How are you this morning?\nModel: ", "You: And what did the old man"]),
        ("forward.py", ["attention_scores: 'He' 1.", "weights: 'He' 0.", "opened the door"]),
        ("log_training.py", ["51 lines;", "'train_loss': ", "'val_loss': "]),
        ("training_loop.py", ["step 14  loss 0.00", "' a red bicycle and rode it to the sea."]),
        ("structured_output.py", ["The story has a ", "The year was 1", "{'name': "]),
    ],
)
def test_offline_programs(
    program: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(program, monkeypatch)
    shown = capsys.readouterr().out
    for text in expected:
        assert text in shown


def test_scores_tell_sense_from_nonsense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("scoring.py", monkeypatch)
    numbers = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert numbers[0] < numbers[1], "perplexity"
    assert numbers[2] > numbers[3], "log-probability"


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("", "Holmes"),
        ("a detective", "Holmes"),
        ("the sailors hunted in the ocean", "The whale"),
        ("a ship in the storm", "The whale"),
        ("a marriage in a good family", "Elizabeth"),
        ("a vampire in the tomb at night", "The Count"),
    ],
)
def test_search_ranks_the_right_text_first(
    query: str,
    first: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("search.py", monkeypatch, *query.split())
    lines = capsys.readouterr().out.splitlines()
    cosines = [float(line.split()[0]) for line in lines]
    assert cosines == sorted(cosines, reverse=True)
    assert len(lines) == 4
    assert lines[0].split(maxsplit=1)[1].startswith(first)


def test_the_fastapi_application() -> None:
    app = runpy.run_path(str(FOLDER / "fastapi_app.py"))["app"]
    with TestClient(app) as client:
        story = client.get("/story", params={"beginning": "Once upon a time"})
        assert story.text.startswith("Once upon a time")
        assert len(story.text) > 60
        assert client.get("/story", params={"beginning": ""}).status_code == 422
        endings: Any = client.get("/endings", params={"text": "The king", "count": 3}).json()
        assert len(endings) == 3
        wrong = client.get("/endings", params={"text": ""})
        assert wrong.status_code == 400
        assert "the prompt is empty" in wrong.text


def test_openais_client(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    run("openai_client.py", monkeypatch)
    assert "2 vectors of 288 numbers" in capsys.readouterr().out


def test_langchains_client(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    run("langchain_client.py", monkeypatch)
    assert "192 numbers" in capsys.readouterr().out


def test_the_ablations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Trained, compared and drawn."""
    text, runs, chart = tmp_path / "text.txt", tmp_path / "runs", tmp_path / "chart.svg"
    text.write_text("she sells sea shells on the sea shore. " * 60, encoding="utf-8")
    run("ablations.py", monkeypatch, str(text), str(runs), "2")
    printed = capsys.readouterr().out
    rows = printed[printed.index("without ") :].splitlines()[1:]
    names = ["nothing", "positions", "scaling", "ffn", "layer-norm", "residual", "causal-mask"]
    assert [row.split()[0] for row in rows] == names
    assert all(1.0 < float(row.split()[1]) < 4.0 for row in rows)
    assert ablation_chart.main([str(runs), "--output", str(chart)]) == 0
    drawn = ElementTree.fromstring(chart.read_text(encoding="utf-8"))
    texts = [one.text or "" for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("whole", *(f"without {name}" for name in names[1:])):
        assert sum(one.startswith(f"{name}: ") for one in texts) == 1
