"""Imports go downward only (the contracts in pyproject.toml); a package loads nothing above it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

ROOT = Path(__file__).parents[1]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"

UPWARD = [
    ("model", "nanovllm.runner"),
    ("model", "nanovllm.engine.scheduling.scheduler"),
    ("runner", "nanovllm.engine"),
    ("runner", "nanovllm.training"),
    ("engine", "nanovllm.llm"),
    ("engine", "nanovllm.server"),
    ("server", "nanovllm.cli"),
]
LOWEST_LAYER = ["errors", "outputs", "sampling_params"]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package in `folder`, with lines too wide to be folded."""
    command = [
        sys.executable,
        "-c",
        LINT_IMPORTS,
        "--config",
        "pyproject.toml",
        "--no-cache",
        "--no-logo",
    ]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package and its contracts, with a training package in any case."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(
        ROOT / "nanovllm",
        folder / "nanovllm",
        ignore=shutil.ignore_patterns("bundled", "__pycache__"),
    )
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "nanovllm" / "training").mkdir(exist_ok=True)
    (folder / "nanovllm" / "training" / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def report(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the report on a copy that contains every violation below."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(copied, folder, dirs_exist_ok=True)
    package = folder / "nanovllm"
    for name, upper in UPWARD:
        with (package / name / "planted.py").open("a") as file:
            file.write(f"import {upper}\n")
    for name in LOWEST_LAYER:
        with (package / f"{name}.py").open("a") as file:
            file.write("\nimport nanovllm.config\n")
    (package / "model" / "planted_lazily.py").write_text("from nanovllm import LLM\n")
    (package / "unlisted.py").touch()
    result = lint(folder)
    assert result.returncode != 0
    return result.stdout


def test_imports_go_downward(copied: Path) -> None:
    for folder in (ROOT, copied):
        result = lint(folder)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("name", "upper"), UPWARD)
def test_upward_import_is_refused(report: str, name: str, upper: str) -> None:
    assert f"nanovllm.{name}.planted -> {upper} " in report


@pytest.mark.parametrize("name", LOWEST_LAYER)
def test_upward_import_from_the_lowest_layer_is_refused(report: str, name: str) -> None:
    assert f"nanovllm.{name} -> nanovllm.config " in report


def test_lazily_loaded_name_is_refused_below(report: str) -> None:
    assert "nanovllm.model.planted_lazily -> nanovllm " in report


def test_module_without_a_layer_is_refused(report: str) -> None:
    assert "nanovllm.unlisted" in report


def modules_after(statement: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after `statement`."""
    program = (
        f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program]
    return set(
        subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        ).stdout.split()
    )


def test_model_is_imported_without_the_rest() -> None:
    loaded = modules_after("import nanovllm.model.families.forward")
    assert "nanovllm.model.families.forward" in loaded
    above = {
        name
        for name in loaded
        if name.startswith(
            (
                "nanovllm.runner",
                "nanovllm.engine",
                "nanovllm.server",
                "nanovllm.llm",
                "nanovllm.hub",
                "nanovllm.cli",
            )
        )
    }
    assert not above
    assert not loaded & {
        "numba",
        "fastapi",
        "uvicorn",
        "huggingface_hub",
        "prometheus_client",
        "torch",
        "transformers",
    }


def test_package_alone_loads_nothing() -> None:
    loaded = modules_after("import nanovllm")
    assert {name for name in loaded if name.startswith("nanovllm")} == {"nanovllm"}
    assert "numpy" not in loaded


def test_exported_names_are_there() -> None:
    program = (
        "import nanovllm; from nanovllm import *; "
        "print(*(name for name in nanovllm.__all__ if name in globals()))"
    )
    names = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert set(names) == {
        "AblationResult",
        "AdamW",
        "AsyncEngine",
        "AsyncLLM",
        "BeamSearchParams",
        "CheckpointError",
        "CompletionOutput",
        "ContextLengthError",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "EngineConfig",
        "EngineError",
        "EngineFaultError",
        "EngineNotReadyError",
        "EvaluationResult",
        "InvalidRequestError",
        "KernelError",
        "LLM",
        "Logprob",
        "ModelNotFoundError",
        "NanovllmError",
        "Prompt",
        "QueueFullError",
        "RequestMetrics",
        "RequestOutput",
        "RequestTimeoutError",
        "SamplingParams",
        "Schedule",
        "SpeculativeConfig",
        "StructuredOutputs",
        "TextPrompt",
        "Tokenizer",
        "TokensPrompt",
        "TrainableModel",
        "Trainer",
        "TrainingConfig",
        "TrainingError",
        "__version__",
        "ablate",
        "evaluate",
    }


def test_exported_names_are_those_of_their_modules() -> None:
    from nanovllm.sampling_params import SamplingParams

    assert nanovllm.SamplingParams is SamplingParams
    assert set(nanovllm.__all__) <= set(dir(nanovllm))
    with pytest.raises(AttributeError, match="'nanovllm' has no attribute 'Sampler'"):
        nanovllm.Sampler  # noqa: B018


def test_shape_annotations_are_checked() -> None:
    """The import hook of conftest.py is active."""
    import numpy as np
    from beartype.roar import BeartypeCallHintViolation
    from jaxtyping import TypeCheckError

    from nanovllm.model.attention import attention_scores

    queries, keys = np.ones((2, 3, 8), dtype=np.float32), np.ones((2, 4, 8), dtype=np.float32)
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        attention_scores(queries, keys, 1.0)
