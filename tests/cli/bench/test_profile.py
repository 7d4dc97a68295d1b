"""`nanovllm bench profile`: the tables, the JSON, the picture, and what it refuses."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from nanovllm.cli.bench.roofline import Limits
from nanovllm.model.families.registry import load_config
from tests.support.bench import bench, refused


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the limits of the machine instead of measuring them."""
    found = Limits(2, "float32", 8e9, 4e9, "float32")
    monkeypatch.setattr(Limits, "measure", lambda _engine: found)


def test_a_decode_step_by_operation_and_thread(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    picture, file = tmp_path / "step.svg", tmp_path / "step.json"
    work = f"--batch-size 4 --input-len 6 --num-iters 3 --num-threads 2 --svg {picture}"
    record = bench(capsys, "profile", tiny_model, work, "--json", file)
    assert (record["benchmark"], record["step"]) == ("profile", "decode")
    assert (record["batch_size"], record["input_len"], record["num_iters"]) == (4, 6, 3)
    assert not record["prefix_caching"]
    operations = {each["name"]: each for each in record["operations"]}
    assert list(operations) == [
        "embed", "layer norm", "qkv", "store", "attention", "out", "up", "down", "final norm",
        "clear", "head", "choose", "Python",
    ]  # fmt: skip
    assert all(each["seconds"] > 0 for each in operations.values())
    for each in operations.values():
        assert each["share"] == pytest.approx(each["seconds"] / record["step_s"])
    model = load_config(tiny_model)
    head = operations["head"]
    assert head["bytes"] == 4 * model.d_model * model.vocab
    assert head["operations"] == 4 * 2 * model.d_model * model.vocab
    assert head["bandwidth_fraction"] == pytest.approx(head["bytes"] / head["seconds"] / 8e9)
    assert head["peak_fraction"] == pytest.approx(head["operations"] / head["seconds"] / 4e9)
    assert operations["attention"]["peak_fraction"] is None
    assert operations["embed"]["bytes"] is None
    assert len(record["threads"]) == 2
    assert record["threads"][0]["computing_s"] > 0
    title = ElementTree.parse(picture).findtext("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.startswith("Decode step of 4 sequences of 6 tokens: ")


def test_a_prefill_step_computes_as_many_tokens_as_fit(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    work = "--prefill --batch-size 2 --max-num-seqs 4 --max-num-batched-tokens 30 --num-iters 1"
    record = bench(capsys, "profile", tiny_model, work, "--no-limits --quantization int8")
    assert (record["step"], record["input_len"], record["limits"]) == ("prefill", 15, None)
    operations = {each["name"]: each for each in record["operations"]}
    assert "quantize" in operations
    assert operations["qkv"]["peak_fraction"] is operations["qkv"]["bandwidth_fraction"] is None
    model = load_config(tiny_model)
    assert operations["qkv"]["bytes"] == 3 * model.layers * model.d_model**2
    assert operations["qkv"]["operations"] == 2 * 30 * operations["qkv"]["bytes"]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("--batch-size 33", "--batch-size is 33"),
        ("--prefill --input-len 20 --batch-size 32", "the prompts have 640; shorten them"),
        ("--backend numpy", "leave --backend out"),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, work: str, message: str
) -> None:
    assert message in refused(capsys, "profile", tiny_model, work)
