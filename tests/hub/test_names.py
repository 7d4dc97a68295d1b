"""Resolving a model's name, and its order."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nanovllm.hub
from nanovllm.errors import CheckpointError, ModelNotFoundError
from nanovllm.hub import BUNDLED_MODEL, download, resolve_model
from nanovllm.model.families.registry import load_config
from tests.support.checkpoints import write_tiny_model
from tests.support.fake_hub import COMMIT, FakeHub

ROOT = Path(__file__).resolve().parents[2]
Resolve = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def resolve(hub: FakeHub, tmp_path: Path) -> Resolve:
    """Resolve names in a process of their own: huggingface-hub reads its settings on import."""
    code = """
import sys
from nanovllm.errors import NanovllmError
from nanovllm.hub import resolve_model
failed = 0
for name in sys.argv[1:]:
    try:
        print(resolve_model(name))
    except NanovllmError as error:
        failed = 1
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
sys.exit(failed)
"""
    folder = tmp_path / "here"
    folder.mkdir()

    def run(*names: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url,
            **variables,
        }
        command = [sys.executable, "-c", code, *names]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=60,
            check=False,
        )

    return run


def test_a_folder_is_itself(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(tiny_model) == resolve_model(str(tiny_model)) == tiny_model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_model, tmp_path / BUNDLED_MODEL)
    assert resolve_model(BUNDLED_MODEL).is_relative_to(Path(nanovllm.hub.__file__).parents[1]), (
        "a folder does not hide the bundled model of its name"
    )
    assert resolve_model(f"./{BUNDLED_MODEL}") == Path(BUNDLED_MODEL)
    assert resolve_model(Path(BUNDLED_MODEL)) == Path(BUNDLED_MODEL)
    assert resolve_model(f"~/{BUNDLED_MODEL}") == tmp_path / BUNDLED_MODEL


def test_the_draft_model_has_the_tokens_of_the_bundled_model() -> None:
    main, draft = resolve_model(BUNDLED_MODEL), resolve_model("tiny-books-draft")
    assert (main / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()
    assert sum(file.stat().st_size for file in main.iterdir()) < 14e6
    assert sum(file.stat().st_size for file in draft.iterdir()) < 2e6


def test_the_bundled_model_is_part_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = resolve_model("tiny-books")
    assert load_config(folder).layers > 0
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "./gpt2",
        "/no/gpt2",
        "~/no/gpt2",
        "../gpt2",
        "a/b/c",
        "models/",
        "models\\gpt2",
        Path("gpt2"),
    ],
)
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(
    name: str | Path,
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"(does not exist|is empty); give a folder"):
        resolve_model(name)


def test_a_path_without_a_checkpoint_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(
        CheckpointError,
        match=(
            r"gpt2 is a folder without config\.json.*"
            r"give the full name \(openai-community/gpt2\)"
        ),
    ):
        resolve_model("gpt2")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; give the folder"):
        resolve_model("model.safetensors")


def test_near_names_are_suggested_without_a_network(resolve: Resolve) -> None:
    expected = {
        "tiny-book": "did you mean tiny-books, which is bundled and needs no network?",
        "Tiny_Books": "did you mean tiny-books, which is bundled",
        "gpt-2": "could not be fetched; did you mean gpt2?",
        "gpt2-larg": "did you mean gpt2-large?",
        "gpt2": "check the network",
        "some/model": "; tiny-books needs no network",
    }
    done = resolve(*expected, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    for told, text in zip(done.stderr.splitlines(), expected.values(), strict=True):
        assert text in told
        assert ("did you mean" in text) == ("did you mean" in told)


@pytest.mark.parametrize(
    ("downloaded", "name"),
    [("gpt2", "openai-community/gpt2"), ("openai-community/gpt2", "gpt2"), ("gpt2", "gpt2")],
)
def test_a_download_answers_to_both_names(
    downloaded: str, name: str, hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    download(downloaded, tmp_path / "gpt2", endpoint=hub.url)
    assert resolve_model(name, models_dir=tmp_path) == tmp_path / "gpt2"


def test_a_name_is_fetched_into_the_cache_and_then_found_there_without_network(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, resolve: Resolve
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    first = resolve("gpt2")
    assert first.returncode == 0, first.stderr
    assert first.stderr == "", "no progress bar where there is no terminal"
    folder = Path(first.stdout.strip())
    assert folder.is_relative_to(tmp_path / "cache")
    assert folder.name == COMMIT
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: gpt2_files[name] for name in wanted
    }
    hub.seen.clear()
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert resolve("openai-community/gpt2", **variables).stdout == first.stdout
    assert hub.seen == []


def test_a_download_of_the_name_comes_before_the_cache(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, resolve: Resolve
) -> None:
    hub.add("someone/model", gpt2_files)
    assert resolve("someone/model").returncode == 0
    local = tmp_path / "here" / "models" / "model"
    hub.add("another/model", gpt2_files)
    download("another/model", local, endpoint=hub.url)
    assert Path(resolve("someone/model").stdout.strip()).is_relative_to(tmp_path / "cache"), (
        "that folder is of another model"
    )
    shutil.rmtree(local)
    download("someone/model", local, endpoint=hub.url)
    assert resolve("someone/model").stdout.strip() == str(Path("models/model"))


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "tokenizer.json"])
def test_a_cached_part_of_a_model_is_completed(
    hub: FakeHub, tmp_path: Path, resolve: Resolve, lost: str
) -> None:
    files = {
        path.name: path.read_bytes()
        for path in write_tiny_model(tmp_path / "sharded", shards=3).iterdir()
    }
    hub.add("someone/model", files)
    folder = Path(resolve("someone/model").stdout.strip())
    blob = (folder / lost).resolve()
    (folder / lost).unlink()
    blob.unlink()
    assert (
        "could not be fetched: HF_HUB_OFFLINE is set"
        in resolve("someone/model", HF_HUB_OFFLINE="1").stderr
    )
    again = resolve("someone/model")
    assert Path(again.stdout.strip()) == folder, again.stderr
    assert (folder / lost).read_bytes() == files[lost]


def test_another_architecture_does_not_reach_the_cache(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, resolve: Resolve
) -> None:
    hub.add("someone/gptj", {**gpt2_files, "config.json": b'{"model_type": "gptj"}'})
    assert resolve("someone/gptj").stderr.startswith(
        "CheckpointError: someone/gptj: this is a gptj model"
    )
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_an_unknown_name_is_an_error_with_the_attempts(
    tiny_model: Path, tmp_path: Path, resolve: Resolve
) -> None:
    told = resolve("no/such").stderr
    assert told.startswith(
        "ModelNotFoundError: there is no folder no/such here, "
        "and it could not be fetched: http://127.0.0.1:"
    )
    assert "has no model no/such" in told
    shutil.copytree(tiny_model, tmp_path / "here" / "models" / "gpt2")
    told = resolve("gpt2", HF_ENDPOINT="http://127.0.0.1:9").stderr
    assert (
        "models/gpt2 exists, but no model_info.json says that it is openai-community/gpt2; "
        "to use it, give that path"
    ) in told
    assert "no connection to http://127.0.0.1:9 " in told


def test_importing_the_package_does_not_import_the_hubs_library() -> None:
    code = (
        "import sys, nanovllm.hub; "
        "print({'huggingface_hub', 'httpx', 'httpx2', 'filelock'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert result.stdout == "set()\n"
