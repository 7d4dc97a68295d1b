"""`download` against a server with the hub's protocol: files, resuming, and errors."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import CheckpointError, ModelNotFoundError
from nanovllm.hub import download, read_model_info, resolve_model
from nanovllm.model.families.registry import load_config
from tests.support.checkpoints import write_tiny_model
from tests.support.fake_hub import COMMIT, FakeHub, Trouble

WANTED = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
NEXT_COMMIT = COMMIT[::-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sharded(tmp_path: Path) -> dict[str, bytes]:
    return contents(write_tiny_model(tmp_path / "sharded", shards=3))


def test_files_arrive_as_they_are_and_nothing_else_is_fetched(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    assert download("gpt2", tmp_path / "gpt2", endpoint=hub.url) == tmp_path / "gpt2"
    got = contents(tmp_path / "gpt2")
    assert got.keys() == WANTED | {"model_info.json"}
    assert all(got[name] == gpt2_files[name] for name in WANTED)
    assert set(hub.fetched()) == WANTED
    assert resolve_model(tmp_path / "gpt2") == tmp_path / "gpt2"


def test_model_info_describes_the_download(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    before = datetime.now(timezone.utc).replace(microsecond=0)
    folder = download("gpt2", tmp_path / "out", endpoint=hub.url)
    info = json.loads((folder / "model_info.json").read_text())
    downloaded_at = datetime.fromisoformat(info.pop("downloaded_at"))
    assert before <= downloaded_at <= datetime.now(timezone.utc)
    config = load_config(folder)
    assert info == {
        "repo": "openai-community/gpt2",
        "asked_for": "openai-community/gpt2",
        "revision": COMMIT,
        "parameters": config.num_parameters,
        "vocab": config.vocab,
        "layers": 2,
        "heads": 4,
        "d_model": 32,
        "context_length": 128,
        "files": {
            name: {
                "size_bytes": len(gpt2_files[name]),
                "sha256": hashlib.sha256(gpt2_files[name]).hexdigest(),
            }
            for name in sorted(WANTED)
        },
    }


def test_a_tokenizer_in_another_form_is_refused_before_anything_is_fetched(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    files = {name: data for name, data in gpt2_files.items() if name != "tokenizer.json"}
    hub.add("meta/llama", {**files, "tokenizer.model": b"\n\x0e"})
    expected = r"meta/llama has no tokenizer\.json, only tokenizer\.model, .*save_pretrained"
    with pytest.raises(CheckpointError, match=expected):
        download("meta/llama", tmp_path / "llama", endpoint=hub.url)
    assert set(hub.fetched()) <= {"config.json"}
    hub.add("meta/none", files)
    with pytest.raises(CheckpointError, match=r"it needs tokenizer\.json, or vocab\.json and"):
        download("meta/none", tmp_path / "none", endpoint=hub.url)


def test_shards_come_with_their_index(hub: FakeHub, tmp_path: Path) -> None:
    files = sharded(tmp_path)
    hub.add("someone/sharded", {**files, "model-of-another-kind.safetensors": b"not for us"})
    got = contents(download("someone/sharded", tmp_path / "out", endpoint=hub.url))
    del got["model_info.json"]
    assert got == files
    assert "model-of-another-kind.safetensors" not in hub.fetched()


def test_a_shard_that_the_repository_lacks_is_named(hub: FakeHub, tmp_path: Path) -> None:
    files = sharded(tmp_path)
    del files["model-00002-of-00003.safetensors"]
    hub.add("someone/sharded", files)
    with pytest.raises(
        CheckpointError, match=r"someone/sharded lacks .*model-00002-of-00003\.safetensors"
    ):
        download("someone/sharded", tmp_path / "out", endpoint=hub.url)


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "/etc/outside.safetensors", "a\\b.safetensors", "code.py"]
)
def test_an_index_cannot_name_files_elsewhere(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, path: str
) -> None:
    del gpt2_files["model.safetensors"]
    index = json.dumps({"weight_map": {"wte.weight": path}}).encode()
    hub.add("someone/model", {**gpt2_files, "model.safetensors.index.json": index, path: b"0"})
    with pytest.raises(CheckpointError, match="no weight_map"):
        download("someone/model", tmp_path / "out", endpoint=hub.url)


def test_a_moved_repository_is_followed(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("new/name", gpt2_files)
    hub.moved["oldname"] = "new/name"
    folder = tmp_path / "models" / "oldname"
    info = read_model_info(download("oldname", folder, endpoint=hub.url))
    assert (info["repo"], info["asked_for"]) == ("new/name", "oldname")
    assert resolve_model("oldname", models_dir=folder.parent) == folder


def test_a_second_run_fetches_nothing_that_is_there(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    download("gpt2", tmp_path, endpoint=hub.url)
    (tmp_path / "tokenizer.json").write_bytes(gpt2_files["tokenizer.json"].replace(b"a", b"b"))
    hub.seen.clear()
    download("gpt2", tmp_path, endpoint=hub.url)
    # The first is fetched to see what it is, the second because it was changed.
    assert hub.fetched() == ["config.json", "tokenizer.json"]
    assert contents(tmp_path)["tokenizer.json"] == gpt2_files["tokenizer.json"]


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_lost_connection_is_taken_up_in_the_same_run(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("openai-community/gpt2", gpt2_files)
    hub.trouble["model.safetensors"] = Trouble(kind, after_bytes=5500)
    download("gpt2", tmp_path, endpoint=hub.url)
    assert contents(tmp_path)["model.safetensors"] == gpt2_files["model.safetensors"]
    assert [seen.range for seen in hub.seen if seen.path.startswith("/store/")] == [
        None,
        "bytes=5000-",
    ]


def test_a_damaged_file_is_not_kept(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    hub.trouble["model.safetensors"] = Trouble("damage")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors of openai-community/gpt2 arrived damaged"
    ):
        download("gpt2", tmp_path, endpoint=hub.url)
    assert not list(tmp_path.rglob("model.safetensors*"))
    assert not (tmp_path / "config.json").exists(), (
        "what is not complete must not look like a model"
    )
    download("gpt2", tmp_path, endpoint=hub.url)
    assert contents(tmp_path)["model.safetensors"] == gpt2_files["model.safetensors"]


def test_an_unfinished_file_of_other_content_is_not_continued(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    hub.trouble["model.safetensors"] = Trouble("damage")
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "model.safetensors.0000000000000000").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="damaged"):
        download("gpt2", tmp_path, endpoint=hub.url)
    assert [seen.range for seen in hub.seen if seen.path.startswith("/store/")] == [None]


def test_a_new_revision_replaces_the_old(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    out = download("gpt2", tmp_path / "out", endpoint=hub.url)
    new = sharded(tmp_path)
    hub.add("openai-community/gpt2", new, commit=NEXT_COMMIT)
    download("gpt2", out, endpoint=hub.url)
    got = contents(out)
    assert read_model_info(out)["revision"] == NEXT_COMMIT
    assert got.keys() == new.keys() | {"model_info.json"}, (
        "the old model.safetensors would be loaded instead of the new shards"
    )


def test_a_folder_on_its_way_to_a_new_revision_is_not_a_model(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    out = download("gpt2", tmp_path / "gpt2", endpoint=hub.url)
    hub.add(
        "openai-community/gpt2",
        {**gpt2_files, "model.safetensors": gpt2_files["model.safetensors"] + b"x"},
        commit=NEXT_COMMIT,
    )
    hub.trouble["model.safetensors"] = Trouble("damage")
    with pytest.raises(CheckpointError, match="damaged"):
        download("gpt2", out, endpoint=hub.url)
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        resolve_model(out)


def test_the_token_goes_to_the_hub_and_not_to_its_store(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("someone/gated", gpt2_files, gated=True)
    download("someone/gated", tmp_path, token="hf_secret", endpoint=hub.url)
    assert {seen.authorization for seen in hub.seen if not seen.path.startswith("/store/")} == {
        "Bearer hf_secret"
    }
    assert {seen.authorization for seen in hub.seen if seen.path.startswith("/store/")} == {None}


def test_another_architecture_is_refused_before_its_weights_are_fetched(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    config = json.dumps({"model_type": "gptj", "architectures": ["GPTJForCausalLM"]}).encode()
    hub.add("someone/gptj", {**gpt2_files, "config.json": config})
    with pytest.raises(
        CheckpointError, match=r"someone/gptj: this is a gptj model \(GPTJForCausalLM\)"
    ):
        download("someone/gptj", tmp_path / "out", endpoint=hub.url)
    assert hub.fetched() == ["config.json"]
    assert not (tmp_path / "out").exists()


def test_pickles_are_refused_with_the_way_to_convert_them(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    del gpt2_files["model.safetensors"]
    hub.add("someone/old", gpt2_files)
    with pytest.raises(
        CheckpointError,
        match=r"only .*pytorch_model\.bin.*Pickles .* are not read.*save_pretrained\('converted'\)",
    ):
        download("someone/old", tmp_path / "out", endpoint=hub.url)
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "someone/model has no config.json"),
        (b"{", "config.json of someone/model is not JSON"),
        (b"[]", "config.json of someone/model holds a list"),
        (b'{"model_type": "gpt2"}', "someone/model: config.json lacks vocab_size"),
    ],
)
def test_a_config_that_is_none_is_refused(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, config: bytes | None, message: str
) -> None:
    files = {
        name: content
        for name, content in {**gpt2_files, "config.json": config}.items()
        if content is not None
    }
    hub.add("someone/model", files)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        download("someone/model", tmp_path / "out", endpoint=hub.url)


def test_a_folder_with_another_model_is_left_alone(
    hub: FakeHub, gpt2_files: dict[str, bytes], tiny_model: Path, tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    hub.add("someone/other", gpt2_files)
    ours = shutil.copytree(tiny_model, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="was not downloaded by nanovllm"):
        download("gpt2", ours, endpoint=hub.url)
    assert contents(ours) == contents(tiny_model)
    out = download("gpt2", tmp_path / "out", endpoint=hub.url)
    with pytest.raises(CheckpointError, match="holds openai-community/gpt2, not someone/other"):
        download("someone/other", out, endpoint=hub.url)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; choose another"):
        download("gpt2", tmp_path / "file", endpoint=hub.url)


def test_two_runs_into_one_folder_do_not_mix(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    from filelock import FileLock

    hub.add("openai-community/gpt2", gpt2_files)
    (tmp_path / ".download").mkdir()
    with (
        FileLock(tmp_path / ".download" / "lock"),
        pytest.raises(ModelNotFoundError, match=r"another download into .* is running"),
    ):
        download("gpt2", tmp_path, endpoint=hub.url)


def test_too_small_a_disk_is_an_error_before_the_weights(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("openai-community/gpt2", gpt2_files)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ModelNotFoundError, match=r"needs .* MB, but .* has room for 0 MB; free some space"
    ):
        download("gpt2", tmp_path / "out", endpoint=hub.url)
    assert hub.fetched() == ["config.json"]


def test_a_full_disk_is_an_error(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    hub.add("openai-community/gpt2", gpt2_files)
    sha256 = hashlib.sha256(gpt2_files["model.safetensors"]).hexdigest()
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / f"model.safetensors.{sha256[:16]}").symlink_to("/dev/full")
    with pytest.raises(
        ModelNotFoundError,
        match="the disk is full before openai-community/gpt2 is complete: free some space",
    ):
        download("gpt2", tmp_path, endpoint=hub.url)


def nowhere(hub: FakeHub) -> dict[str, Any]:
    """The address of a server that is no longer there."""
    with FakeHub() as other:
        return {"endpoint": other.url}


def out_of_order(status: HTTPStatus) -> Callable[[FakeHub], dict[str, Any]]:
    def prepare(hub: FakeHub) -> dict[str, Any]:
        hub.status = status
        return {}

    return prepare


def not_a_hub(hub: FakeHub) -> dict[str, Any]:
    hub.body = b"<html>Log in to the hotel's network</html>"
    return {}


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        (
            "gpt2",
            nowhere,
            (
                r"no connection to http://127\.0\.0\.1:\d+ \(ConnectError: "
                r".*check the network, set HF_ENDPOINT to a mirror, or download "
            ),
        ),
        (
            "gpt2",
            lambda hub: {"endpoint": "huggingface.co"},
            "the hub's address is 'huggingface.co', which is not a URL",
        ),
        ("gpt2", lambda hub: {"endpoint": "http://[::1"}, "is not a URL"),
        (
            "gpt2",
            out_of_order(HTTPStatus.SERVICE_UNAVAILABLE),
            r"answered 503 \(out of order\) for openai-community/gpt2: try again later",
        ),
        ("gpt2", out_of_order(HTTPStatus.TOO_MANY_REQUESTS), "answered 429 .*wait a few minutes"),
        ("gpt2", out_of_order(HTTPStatus.FORBIDDEN), "answered 403 .*check that HF_TOKEN is valid"),
        ("gpt2", not_a_hub, "does not answer as a Hugging Face hub does"),
        ("no/such", lambda hub: {}, "has no model no/such, or it is private: check the spelling"),
        ("no such name", lambda hub: {}, "no such name cannot be the name of a model on the hub"),
        ("someone/model", lambda hub: {"revision": "v9"}, "someone/model has no revision v9"),
        (
            "someone/gated",
            lambda hub: {},
            (
                r"someone/gated is gated: accept its terms at "
                r"http://127\.0\.0\.1:\d+/someone/gated, then set HF_TOKEN"
            ),
        ),
    ],
)
def test_errors_of_the_hub_name_a_remedy(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    name: str,
    prepare: Callable[[FakeHub], dict[str, Any]],
    message: str,
) -> None:
    hub.add("someone/model", gpt2_files)
    hub.add("someone/gated", gpt2_files, gated=True)
    options = {"endpoint": hub.url, **prepare(hub)}
    with pytest.raises(ModelNotFoundError, match=message):
        download(name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
