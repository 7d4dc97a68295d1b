"""The race measures every engine alike, and the time inside each function of the course."""

import json
from pathlib import Path

import pytest

from nanovllm.cli import race as command
from nanovllm.cli.main import main
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.learn.course import STEPS
from nanovllm.learn.engine import engine_parts_of
from nanovllm.learn.folder import CourseFolder
from nanovllm.learn.parts import load_parts
from nanovllm.learn.race import Workload, profile, race
from nanovllm.learn.stubs import readers_source

WORKLOADS = (Workload("prefill", 1, 12, 1, counts_prompts=True), Workload("decode", 2, 3, 5))


def folder_with_layer_norm(path: Path) -> Path:
    """Write a folder in which only step 3 is written."""
    CourseFolder.start(path)
    source = readers_source(STEPS[2].text("solution.py"))
    (path / "step03_layer_norm.py").write_text(source, encoding="utf-8")
    return path


def test_every_function_has_its_own_time(tiny_model: Path, tmp_path: Path) -> None:
    folder = folder_with_layer_norm(tmp_path / "gpt")
    parts = load_parts(folder)
    layer_norm = parts["step03_layer_norm"].layer_norm
    engine = Engine.load(
        tiny_model, EngineConfig(backend="numpy", num_blocks=8), engine_parts_of(parts, folder)
    )
    times = {one.name: one for one in profile(engine, parts, WORKLOADS)}
    assert times["layer_norm"].is_readers
    assert not times["linear"].is_readers
    assert (times["layer_norm"].step, times["Scheduler.schedule"].step) == (3, 9)
    layers, steps = engine.model.layers, times["Scheduler.schedule"].calls
    assert times["layer_norm"].calls == (2 * layers + 1) * steps
    assert times["linear"].calls == 4 * layers * steps
    assert 0 < sum(one.share for one in times.values()) < 1
    assert parts["step03_layer_norm"].layer_norm is layer_norm  # as it was


def test_all_engines_take_every_turn(tiny_model: Path) -> None:
    engines = {
        name: Engine.load(tiny_model, EngineConfig(backend="numpy", num_blocks=8)) for name in "ab"
    }
    turns: list[None] = []
    rates = race(engines, WORKLOADS, 2, lambda: turns.append(None))
    assert len(turns) == 3 * 2 * 2
    assert [list(figures) for figures in rates.values()] == [["a", "b"], ["a", "b"]]
    assert all(rate > 0 for figures in rates.values() for rate in figures.values())
    steps = 3 * (1 + 5)
    assert all(engine.num_steps == steps for engine in engines.values())


def test_the_command_draws_bars_and_names_what_is_next(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = folder_with_layer_norm(tmp_path / "gpt")
    monkeypatch.setattr(command, "resolve_model", lambda name: tiny_model)
    monkeypatch.setattr(command, "WORKLOADS", WORKLOADS)
    file = tmp_path / "race.json"
    arguments = ["learn", "race", "--folder", str(folder), "--rounds", "1", "--json", str(file)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "prefill, in tokens a second\n  yours  █" in out
    assert "Next: layer_norm (step 3) takes" in out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert list(record["tokens_per_s"]["decode"]) == ["yours", "numpy", "numba"]
    assert record["matmul_gflops"] == {}
    assert "project's  linear" in out


def test_without_a_folder_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["learn", "race"]) == 1
    assert "there is no reader's folder here" in capsys.readouterr().err
