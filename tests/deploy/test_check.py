"""The check of a config file, which needs neither Ray nor weights."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nanovllm.deploy.check import BUILDER, check_models, main
from nanovllm.deploy.settings import read_settings
from nanovllm.model.machine import MemoryLimit

ROOT = Path(__file__).parents[2]
RAY_SERVICE = ROOT / "deploy" / "kubernetes" / "ray" / "rayservice.yaml"


def write(path: Path, *models: dict[str, Any], applications: int = 1) -> str:
    settings = {"models": [{"model": "tiny-books", **model} for model in models or ({},)]}
    application = {"name": "books", "import_path": BUILDER, "args": settings}
    content = {"applications": [application] * applications}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_a_valid_file_is_summarized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"replicas": 2, "max_replicas": 6, "num_threads": 4}
    assert main([write(tmp_path / "a.yaml", model), "--cpus", "24"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "application 'books': 24 CPUs of 24"
    assert second.startswith("  tiny-books: 2 to 6 replicas of 4 CPUs, ")


def test_a_manifest_of_kubernetes_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RAY_SERVICE)]) == 0
    assert "64 CPUs, added on demand" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"replicas": 2, "num_threads": 64}, "the replicas need 128 CPUs"),
        ({"replicas": "two"}, "models.0.replicas: Input should be a valid integer"),
        ({"replica": 2}, "models.0.replica: Extra inputs are not permitted"),
        ({"model": "./nothing"}, "does not exist"),
        ({"options": {"quantization": "int3"}}, "an option of tiny-books is not valid"),
        ({"options": {"max-model-len": 9999}}, "has only 512 positions"),
        ({"options": {"api-key": "secret"}}, "use api-key-file"),
    ],
)
def test_a_wrong_file_is_refused_with_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], message: str
) -> None:
    assert main([write(tmp_path / "a.yaml", model), "--cpus", "8"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") <= 2
    assert not shown.out
    assert "secret" not in shown.err


def test_two_models_with_one_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write(tmp_path / "a.yaml", {}, {}), "--cpus", "2"]) == 2
    assert "two models have the name 'tiny-books'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("[]", "no list of `applications`"),
        ("applications: [{import_path: 'other:app'}]", "no application has the import_path"),
        (f"applications: [{{import_path: '{BUILDER}'}}]", "has no `args`"),
        ("kind: RayService", "no spec.serveConfigV2"),
    ],
)
def test_a_file_without_an_application_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(content, encoding="utf-8")
    assert main([str(file)]) == 2
    assert message in capsys.readouterr().err
    assert main([str(tmp_path / "missing.yaml")]) == 2


def test_the_replicas_of_one_machine_share_its_memory() -> None:
    limit = MemoryLimit("memory.max", 8 << 30, 0)
    option = {"kv-cache-memory": "2GiB"}
    model = {"model": "tiny-books", "replicas": 3, "options": option}
    check_models(read_settings({"models": [model]}), limit)
    settings = read_settings({"models": [{**model, "max_replicas": 4}]})
    check_models(settings, None)  # on several machines
    with pytest.raises(ValueError, match=r"need 8\.4 GiB of memory together, but memory\.max is 8"):
        check_models(settings, limit)


@pytest.mark.parametrize(
    ("model", "applications", "message"),
    [
        ({"options": {"kv-cache-memory": "900GiB"}}, 1, "the KV cache 900 GiB, but "),
        ({"options": {"kv-cache-memory": "2GiB"}}, 2, "need 4.2 GiB of memory together, but"),
        ({}, 2, "need 2.2 GiB of memory together, but"),
        ({"replicas": 2}, 1, "need 2.2 GiB of memory together, but"),
        ({}, 1, None),  # the KV cache shrinks
    ],
)
def test_the_memory_of_this_machine_counts_unless_the_cluster_is_another(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    applications: int,
    message: str | None,
) -> None:
    limit = MemoryLimit("memory.max", 3 << 30 if "options" in model else 1 << 30, 0)
    monkeypatch.setattr("nanovllm.deploy.check.memory_limit", lambda: limit)
    monkeypatch.setattr("nanovllm.deploy.check.usable_cpus", lambda: 4)
    file = write(tmp_path / "a.yaml", model, applications=applications)
    assert main([file]) == (0 if message is None else 2)
    assert (message or "") in capsys.readouterr().err
    assert main([file, "--cpus", "64"]) == 0
