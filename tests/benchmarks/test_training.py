"""The comparison of training with PyTorch: its measure, its tables and its chart."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import nanogpt, table, training, training_profile
from benchmarks.contenders import Contender, Entry, WorkerError
from benchmarks.options import PYTHON_VARIABLE
from benchmarks.peers import train_ours
from benchmarks.training_worker import SETTINGS, Setting, measure
from nanovllm import TrainingConfig
from nanovllm.cli.bench.roofline import Costs
from nanovllm.model.config import ModelConfig
from nanovllm.training.config import read_toml
from nanovllm.training.network.schedule import Schedule
from tools import loss_chart

TINY = Setting(layers=2, heads=2, width=8, context=4, batch=3, vocab=11)
TURNS = {"nanovllm": [0.02, 0.03, 0.01], "torch": [0.03, 0.09, 0.03], "torch bfloat16": [0.1] * 3}
MEMORY = {"nanovllm": 100 << 20, "torch": 400 << 20, "torch bfloat16": None}


def test_operations_are_three_times_those_of_the_forward_pass() -> None:
    for setting in (TINY, *SETTINGS.values()):
        pairs = setting.batch * setting.context * (setting.context + 1) // 2
        costs = Costs.of(train_ours.config_of(setting), "float32", 0.0)
        forward = costs.operations(setting.tokens, pairs, setting.tokens)
        assert setting.operations == 3 * forward


def test_the_first_step_of_a_turn_is_not_timed() -> None:
    steps, seconds = itertools.count(), itertools.count()
    result = measure(lambda: (float(next(steps)), 2.0), 3.5, clock=lambda: float(next(seconds)))
    assert result["step_s"] == [1.0, 2.0, 3.0, 4.0]
    assert result["loss"] == 2.0


def test_our_step_updates_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        step, about = train_ours.load(TINY, {"backend": "numpy"}, 1, 0)
        assert about["parameters"] == 2 * (12 * 8 * 8 + 13 * 8) + 11 * 8 + 4 * 8 + 2 * 8
        return [step()[1] for _ in range(2)]

    first, second = losses()
    assert first == pytest.approx(np.log(TINY.vocab), abs=0.05)
    monkeypatch.setattr(train_ours, "LEARNING_RATE", 0.0)
    untrained = losses()
    assert untrained[0] == first
    assert untrained[1] != second


def test_torch_computes_the_same_network() -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.peers.torch_gpt2 import GPT2, make_optimizer
    from nanovllm.model.checkpoint import expected_shapes
    from nanovllm.training.network.model import batch_loss
    from nanovllm.training.network.numpy_operations import NumpyOperations
    from nanovllm.training.network.parameters import Parameters, initialize, is_decayed

    config = ModelConfig(vocab=11, max_positions=4, d_model=8, layers=2, heads=2, d_ff=32)
    parameters = Parameters(expected_shapes(config))
    initialize(parameters, config, 3)
    names = {"qkv": "attn.c_attn", "attn_out": "attn.c_proj", "ffn_in": "mlp.c_fc"}
    names |= {"ffn_out": "mlp.c_proj"}
    model = GPT2(TINY)
    decayed = {id(one) for one in make_optimizer(model).param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        ours = name.replace("blocks", "h")
        for theirs, replacement in names.items():
            ours = ours.replace(theirs, replacement)
        array = parameters.tensors[ours].data
        is_linear = ".attn." in ours or ".mlp." in ours
        parameter.data.copy_(torch.from_numpy(array.T if is_linear else array))
        assert (id(parameter) in decayed) == is_decayed(ours)
    tokens = np.random.default_rng(0).integers(11, size=(3, 5))
    total = batch_loss(NumpyOperations(), config, parameters, tokens[:, :-1], tokens[:, 1:])
    loss = model(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])).item()
    assert total / TINY.tokens == pytest.approx(loss, abs=1e-6)


def test_torch_trains_by_the_same_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from benchmarks.peers import nanogpt_torch

    settings = {**read_toml(nanogpt.RECIPE), "seed": 1, "steps": 40, "warmup_steps": 4}
    schedule = Schedule(1e-3, 1e-4, 4, 40)
    for step in (0, 3, 4, 20, 39):
        rate = nanogpt_torch.learning_rate(step, settings)
        assert rate == pytest.approx(schedule.learning_rate(step))
    small = {"layers": 1, "heads": 2, "width": 8, "context": 4, "batch_size": 8, "eval_every": 20}
    nanogpt_torch.train("to be or not to be " * 20, {**settings, **small})
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["step"], second["step"], third["step"]) == (0, 20, 40)
    assert first["train_loss"] is None
    assert first["val_loss"] > second["val_loss"] > third["val_loss"]


def test_the_profile_has_all_the_time_of_a_step() -> None:
    found = training_profile.profile(TINY, threads=2, seed=1, rounds=1)
    seconds = {each["name"]: each["seconds"] for each in found["operations"]}
    assert sum(seconds.values()) == pytest.approx(found["step_s"])
    assert min(seconds.values()) > 0
    names = {"linear 8, 24: pack", "linear backward 32, 8: matmuls", "attention", "adamw"}
    assert {*names, "cross entropy: gradients", "launch", "Python"} <= seconds.keys()
    work = {each["name"]: each["operations"] for each in found["operations"]}
    assert work["linear 8, 32: matmul"] == 2 * (2 * TINY.tokens * 8 * 32)  # of two layers
    record = {"benchmark": "training_profile", "results": [
        {"setting": "tiny", "peak_operations_per_s": 1e9, **found}
    ]}  # fmt: skip
    machine = {"cpu": "a CPU", "nanovllm": "0"}
    shown = table.markdown(
        {**record, "date": "2026-01-01", "machine": machine, "threads": 2, "seed": 1}
    )
    assert "| **tiny** |" in shown
    assert "| launch |" in shown


class FakeContender:
    """Answers with the turns above; it has no process."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.about = entry, dict[str, Any]()
        self._turns = iter(TURNS[entry.name])

    def request(self, _timeout_s: float, seconds: float) -> dict[str, Any]:
        step_s = next(self._turns)
        return {"step_s": [step_s] * 3, "loss": seconds, "peak_bytes": MEMORY[self.entry.name]}

    def close(self) -> None:
        pass


@pytest.fixture
def record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> dict[str, Any]:
    """The record of training.py about fake contenders."""

    def start(entry: Entry, setting: str, *_: object) -> FakeContender:
        assert setting in SETTINGS
        if "compile" in entry.name:
            raise WorkerError("no compiler")
        return FakeContender(entry)

    monkeypatch.setattr(Contender, "start", start)
    monkeypatch.setattr(training, "make_operations", lambda *_: SimpleNamespace(close=lambda: None))
    peaks = {"float32": 100e9, "bfloat16": 100e9}
    monkeypatch.setattr(training, "measure_peak", lambda dtype, _: peaks[dtype])
    monkeypatch.setattr(training, "peak_type", lambda _: "float32")
    file = tmp_path / "training.json"
    flags = ["--torch-python", "python", "--compile", "--bfloat16", "--json", str(file)]
    assert training.main([*flags, "--settings", "small,bpe"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(file.read_text(encoding="utf-8")) == found
    return found


def test_training_compares_within_rounds(record: dict[str, Any]) -> None:
    small, bpe = record["settings"]
    assert (small["setting"], bpe["setting"]) == ("small", "bpe")
    assert small["problems"] == {"torch compile": "no compiler"}
    ours, torch, bfloat16 = small["contenders"].values()
    assert ours["ratio_to_torch"] == 3.0  # of 1.5, 3 and 3
    assert ours["step_s"]["median"] == 0.02
    assert ours["tokens_per_s"] == pytest.approx(12 * 256 / 0.02)
    assert ours["share_of_peak"] == pytest.approx(SETTINGS["small"].operations / 0.02 / 100e9)
    assert (torch["ratio_to_torch"], torch["peak_bytes"]) == (1.0, 400 << 20)
    assert bfloat16["share_of_peak"] == pytest.approx(SETTINGS["small"].operations / 0.1 / 100e9)
    assert bfloat16["peak_type"] == "float32"


def test_training_has_a_table(record: dict[str, Any]) -> None:
    lines = table.markdown(record).splitlines()
    assert "| **small**: nanovllm | 153,600 | 20.0 |" in lines[2]
    assert lines[2].endswith("| 3.00 | 105 MB |")
    assert lines[4].startswith("| torch bfloat16 | ")
    assert lines[4].endswith("% (of float32's peak) | 0.30 | - |")
    assert lines[-1].startswith(record["date"][:10])


def test_training_fails_where_ours_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise WorkerError("out of memory")

    monkeypatch.setattr(Contender, "start", start)
    monkeypatch.setattr(training, "measure_peak", lambda *_: None)
    assert training.main(["--backend", "numpy", "--settings", "bpe"]) == 1


def test_the_recipe_is_nanogpts() -> None:
    settings = read_toml(nanogpt.RECIPE)
    config = TrainingConfig.from_dict({**settings, "data": ["input.txt"], "output": "run"})
    assert (config.layers, config.heads, config.width, config.context) == (4, 4, 128, 64)
    assert (config.batch_size, config.steps, config.tokenizer) == (12, 2000, "char")
    assert set(settings) >= {"lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip"}


@pytest.mark.parametrize(
    ("losses", "is_reached"),
    [
        ({"nanovllm": 1.89}, True),
        ({"nanovllm": 1.91}, False),
        ({"nanovllm": 1.91, "torch": 1.80}, False),
        ({"nanovllm": 1.91, "torch": 1.90}, True),
    ],
)
def test_nanogpt_has_two_targets(
    losses: dict[str, float],
    is_reached: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def run(name: str) -> list[dict[str, Any]]:
        values = (4.2, 2.5, losses[name])
        return [
            {"step": step, "train_loss": value if step else None, "val_loss": value}
            for step, value in zip((0, 1000, 2000), values, strict=True)
        ]

    monkeypatch.setattr(nanogpt, "train_ours", lambda *_: run("nanovllm"))
    monkeypatch.setattr(nanogpt, "train_torch", lambda *_: run("torch"))
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    flags = ["--torch-python", "python"] if "torch" in losses else []
    file = tmp_path / "nanogpt.json"
    code = nanogpt.main([str(tmp_path / "input.txt"), *flags, "--json", str(file)])
    assert code == int(not is_reached)
    out = capsys.readouterr().out
    assert "| validation loss at step | 0 | 1,000 | 2,000 |" in out
    assert f"| nanovllm | 4.2000 | 2.5000 | {losses['nanovllm']:.4f} |" in out
    chart = tmp_path / "chart.svg"
    assert loss_chart.main([str(file), "--output", str(chart)]) == 0
    drawn = ElementTree.fromstring(chart.read_text(encoding="utf-8"))
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert f"nanovllm, validation: {losses['nanovllm']:.3f}" in texts
    assert {"step", "loss in nats per character", "1000", "2000"} <= set(texts)
