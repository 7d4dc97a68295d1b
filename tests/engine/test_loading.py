"""A draft model: what is refused before any weights are read, and what then is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm import LLM, CheckpointError, EngineConfig, ModelNotFoundError
from nanovllm.engine.engine import Engine
from nanovllm.engine.memory import check_sizes, plan_memory
from nanovllm.hub import repo, resolve_models
from nanovllm.hub.names import bundled_folder
from nanovllm.model.config import ModelConfig
from nanovllm.model.machine import MemoryLimit
from nanovllm.model.numpy_backend import NumpyBackend
from tests.support.checkpoints import write_tiny_model

MIB = 1 << 20


def config(draft: Path | str, **settings: object) -> EngineConfig:
    return EngineConfig(speculative_config={"model": str(draft), **settings}, backend="numpy")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model of 64 positions; the tiny model has 128."""
    folder = tmp_path_factory.mktemp("short") / "model"
    return write_tiny_model(folder, config={"n_positions": 64})


def test_another_vocabulary_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"another vocabulary .*\(2,048 and 267 tok"):
        Engine.check(tiny_model, config(bundled_folder()))


def test_the_same_number_of_other_tokens_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other")
    Engine.check(tiny_model, config(other))
    path = other / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["x"], vocab["z"] = vocab["z"], vocab["x"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another vocabulary .*same tokenizer"):
        Engine.check(tiny_model, config(other))


def test_a_draft_with_fewer_positions_is_refused(tiny_model: Path, short: Path) -> None:
    with pytest.raises(ValueError, match=r"64 positions, less than max_model_len \(128\); lower"):
        Engine.check(tiny_model, config(short))
    Engine.check(tiny_model, replace(config(short), max_model_len=64))


def test_a_draft_that_exceeds_the_memory_is_refused() -> None:
    model = ModelConfig(
        vocab=50257, max_positions=1024, d_model=768, layers=12, heads=12, d_ff=3072
    )
    limit = MemoryLimit("memory.max", 600 * MIB, 50 * MIB)
    check_sizes(EngineConfig(), model, limit)
    with pytest.raises(
        ValueError,
        match=r"475 MiB in float32 and those of the draft model 475 MiB in float32, but .*; raise "
        "it, or choose a smaller draft model or none",
    ):
        check_sizes(EngineConfig(), model, limit, (EngineConfig(), model))
    int8 = EngineConfig(quantization="int8")
    with pytest.raises(ValueError, match=r"those of the draft model 119 MiB in int8"):
        check_sizes(EngineConfig(), model, limit, (int8, model))
    check_sizes(int8, model, limit, (int8, model))


def test_the_cache_is_shared_with_the_draft_model(tiny_model: Path) -> None:
    backend = NumpyBackend.load(tiny_model)
    alone = plan_memory(EngineConfig(backend="numpy"), [backend], 128, None)
    both = plan_memory(EngineConfig(backend="numpy"), [backend, backend], 128, None)
    assert both.num_blocks == alone.num_blocks // 2
    limit = MemoryLimit("memory.max", 60 * MIB, 0)
    with pytest.raises(ValueError, match="or choose a smaller draft model or none"):
        plan_memory(EngineConfig(backend="numpy"), [backend, backend], 128, limit)


def test_names_are_resolved_in_one_place(tiny_model: Path) -> None:
    folder, found = resolve_models(tiny_model, config("tiny-books-draft"))
    assert folder == tiny_model
    assert found.speculation is not None
    assert found.speculation.model == str(bundled_folder("tiny-books-draft"))
    plain = EngineConfig()
    assert resolve_models(tiny_model, plain) == (tiny_model, plain)


ABOUT = "^the draft model in speculative_config: "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the model's name is empty"),
        ("./missing", r"\./missing does not exist"),
        ("gpt2", "there is no folder gpt2 here, and it could not be fetched"),
    ],
)
def test_what_is_wrong_with_the_draft_model_names_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    def offline(_: str) -> None:
        raise ModelNotFoundError("no connection")

    monkeypatch.setattr(repo, "cached_snapshot", lambda _: None)
    monkeypatch.setattr(repo, "fetch_snapshot", offline)
    with pytest.raises(ModelNotFoundError, match=ABOUT + message):
        LLM(tiny_model, speculative_config={"model": name})
    with pytest.raises(ModelNotFoundError, match=f"^{message}"):
        LLM(name)


def test_invalid_files_of_the_draft_model_name_it(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=ABOUT):
        Engine.load(tiny_model, config(other))
    (other / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=ABOUT):
        Engine.check(tiny_model, config(other))
