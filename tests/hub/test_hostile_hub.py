"""A broken or malicious hub: every response is bounded and checked."""

import json
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import CheckpointError, ModelNotFoundError
from nanovllm.hub import download, downloads, repo, transfer
from tests.support.fake_hub import COMMIT, FakeHub, Trouble

NAME = "someone/model"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.0)


def listing(files: dict[str, bytes], **changes: Any) -> dict[str, Any]:
    """The hub's list of files without checksums."""
    siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
    return {"id": NAME, "sha": COMMIT, "siblings": siblings, **changes}


def test_a_config_without_end_is_refused(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, gpt2_files)
    hub.endless.add("config.json")
    with pytest.raises(CheckpointError, match=r"config\.json of someone/model is larger than the"):
        download(NAME, tmp_path / "out", endpoint=hub.url)
    assert hub.endless_bytes < 32 * MIB  # what the sockets hold
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_huge_declared_size_is_refused(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repo, "MAX_CONFIG_BYTES", 100)
    hub.add(NAME, gpt2_files)
    with pytest.raises(CheckpointError, match=r"config\.json .* larger than the 100 bytes"):
        download(NAME, tmp_path / "out", endpoint=hub.url)


def test_a_list_of_files_without_end_is_refused(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repo, "MAX_LISTING_BYTES", MIB)
    hub.add(NAME, gpt2_files)
    hub.endless.add("list")
    with pytest.raises(ModelNotFoundError, match="its list of files has no end"):
        download(NAME, tmp_path / "out", endpoint=hub.url)
    assert hub.endless_bytes < 32 * MIB


@pytest.mark.parametrize("declared", [True, False])
def test_weights_without_end_do_not_fill_the_disk(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    declared: bool,
) -> None:
    monkeypatch.setattr(downloads, "_MAX_BUFFER_BYTES", 0)
    hub.add(NAME, gpt2_files)
    hub.endless.add("model.safetensors")
    if not declared:
        siblings = [{"rfilename": name} for name in gpt2_files]
        hub.listing = json.dumps(listing({}, siblings=siblings)).encode()
    with pytest.raises(CheckpointError, match=r"model\.safetensors of someone/model is larger"):
        download(NAME, tmp_path, endpoint=hub.url)
    assert hub.endless_bytes < 32 * MIB
    assert not list(tmp_path.rglob("model.safetensors*"))


def weights(**changes: Any) -> Callable[[dict[str, bytes]], Any]:
    """A list whose entry of the weights is changed."""

    def change(files: dict[str, bytes]) -> Any:
        changed = listing(files)
        next(one for one in changed["siblings"] if one["rfilename"] == "model.safetensors").update(
            changes
        )
        return changed

    return change


WRONG_LISTS: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "a size that is text": weights(size="x"),
    "a size below 0": weights(size=-1),
    "a size that is a bool": weights(size=True),
    "a name that is a number": weights(rfilename=5),
    "a checksum that is a number": weights(lfs={"size": 1, "sha256": 5}),
    "a checksum that is a path": weights(lfs={"size": 1, "sha256": "/../.." + "0" * 58}),
    "a checksum with a control character": weights(lfs={"size": 1, "sha256": "\x1b" + "0" * 63}),
    "LFS data that are a list": weights(lfs=[1]),
    "LFS data without a size": weights(lfs={"sha256": "0" * 64}),
    "a blob that is no name of git": weights(blobId="../x"),
    "no commit": lambda files: listing(files, sha=None),
    "a commit that is a path": lambda files: listing(files, sha="../../x"),
    "a commit with a control character": lambda files: listing(files, sha="\x1b[31m" + "0" * 40),
    "an id that is a number": lambda files: listing(files, id=5),
    "an id with a control character": lambda files: listing(files, id="a/\x1b[31m"),
    "files that are a number": lambda files: listing(files, siblings=5),
    "files that are numbers": lambda files: listing(files, siblings=[5]),
    "a list": lambda files: [],
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_a_malformed_listing_is_an_error(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    hub.add(NAME, gpt2_files)
    hub.listing = json.dumps(WRONG_LISTS[name](gpt2_files)).encode()
    with pytest.raises(ModelNotFoundError, match="does not answer as a Hugging Face hub") as told:
        download(NAME, tmp_path / "out", endpoint=hub.url)
    assert str(told.value).isprintable()


def test_deeply_nested_json_is_an_error(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    deep = b"[" * 100_000
    hub.add(NAME, {**gpt2_files, "config.json": deep})
    with pytest.raises(CheckpointError, match=r"config\.json of someone/model is not JSON"):
        download(NAME, tmp_path / "out", endpoint=hub.url)
    hub.listing = deep
    with pytest.raises(ModelNotFoundError, match="does not answer as a Hugging Face hub"):
        download(NAME, tmp_path / "out", endpoint=hub.url)


def test_control_characters_of_the_hub_are_escaped(
    hub: FakeHub, gpt2_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, {**gpt2_files, "config.json": b'{"model_type": "\\u001b[31mred"}'})
    with pytest.raises(CheckpointError, match=r"this is a \\x1b\[31mred model"):
        download(NAME, tmp_path / "out", endpoint=hub.url)
    hub.status, hub.error = HTTPStatus.FORBIDDEN, b'{"error": "\\u001b[31mred"}'
    with pytest.raises(ModelNotFoundError, match=r"answered 403 \(\\x1b\[31mred\)"):
        download(NAME, tmp_path / "out", endpoint=hub.url)


def test_a_connection_that_brings_a_byte_each_time_is_given_up(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1)
    hub.add(NAME, gpt2_files)
    hub.trouble["model.safetensors"] = Trouble("cut", after_bytes=1, repeats=True)
    with pytest.raises(ModelNotFoundError, match="no connection"):
        download(NAME, tmp_path, endpoint=hub.url)
    tries = [seen.range for seen in hub.seen if seen.path.startswith("/store/")]
    assert tries == [None, *(f"bytes={number}-" for number in range(1, transfer.MAX_TRIES))]


def test_progress_brings_more_tries(
    hub: FakeHub,
    gpt2_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = len(gpt2_files["model.safetensors"])
    step = size // (2 * transfer.MAX_TRIES)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", step)
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", step)
    hub.add(NAME, gpt2_files)
    hub.trouble["model.safetensors"] = Trouble("cut", after_bytes=step, repeats=True)
    download(NAME, tmp_path, endpoint=hub.url)
    assert (tmp_path / "model.safetensors").read_bytes() == gpt2_files["model.safetensors"]


def test_pauses_double_and_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(transfer, "MAX_TRIES", 8)
    assert list(transfer.pauses_s(lambda low, high: high)) == [1, 2, 4, 8, 16, 30, 30]
    assert list(transfer.pauses_s(lambda low, high: low)) == [0.5, 1, 2, 4, 8, 15, 15]
    assert all(0.5 <= first <= 1 for first, *_ in (transfer.pauses_s() for _ in range(20)))
