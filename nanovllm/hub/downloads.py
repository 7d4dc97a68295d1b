"""A model's files from the Hugging Face hub in a folder of their own, with a model_info.json that says what they are.

The transfer is not left to huggingface-hub's snapshot_download, since that throws an unfinished file away, and a GPT-2 is one large
file: here it is kept under the checksum that the hub gives for it, continued by the next run, and compared with that checksum.
huggingface-hub is imported inside the function that uses it: it takes longer to import than the rest of the package.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import CheckpointError, ModelNotFoundError, printable
from nanovllm.model.config import GPT2Config, read_json

if TYPE_CHECKING:
    from nanovllm.hub.repo import HubFile, HubRepo

MODEL_INFO = "model_info.json"
_SHORT_NAMES = {
    "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium", "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl", "distilgpt2": "distilbert/distilgpt2",
}  # fmt: skip
_UNFINISHED = ".download"  # folder inside the output for files that are not complete
_READ_BYTES = 1 << 20
_MAX_COMPANION_BYTES = 64 << 20  # of what is not weights
_MAX_PARAMETER_BYTES, _MAX_BUFFER_BYTES = 8, 1 << 30  # causal masks of old checkpoints are buffers


def download(
    name: str,
    output: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetch the model `name` from the hub into the folder `output`, and say in its model_info.json what it is; returns `output`.

    A run that was interrupted is continued: files that are complete are kept, and the one that is not goes on where it stopped.
    Every file is compared with the checksum that the hub gives for it. config.json comes last: a folder without it is not a model.

    Args:
        revision: branch, tag or commit; None for the main branch.
        token: for gated and private models; None for HF_TOKEN.
        endpoint: address of the hub; None for HF_ENDPOINT.

    Raises:
        CheckpointError: not a GPT-2 checkpoint in safetensors format, damaged on the way, or `output` holds another model.
        ModelNotFoundError: the hub does not give it, or the disk has no room for it; the message names the remedy.
    """
    from nanovllm.hub.repo import HubRepo, explained  # noqa: PLC0415  # see the top of the file

    hub = HubRepo.look_up(full_name(name), revision=revision, token=token, endpoint=endpoint)
    config = hub.config()
    files = sorted(hub.model_files(), key=lambda file: file.name == "config.json")
    old = _check_output(output, hub)
    with explained(hub.repo, hub.endpoint), _locked(output):
        if old.get("revision") != hub.commit:
            _remove_superseded(output, old, {file.name for file in files})
        sha256s = {
            file.name: sha256
            for file in files
            if file.has_checksum and (sha256 := _sha256_if_intact(output / file.name, file))
        }
        missing = [file for file in files if file.name not in sha256s]
        _check_space(output, missing)
        for file in missing:
            sha256s[file.name] = _fetch(hub, file, output, config)
        _write_model_info(output, hub, config, sha256s)
    return output


def full_name(name: str) -> str:
    """The repository that a short name such as "gpt2" stands for; any other name as it is."""
    return _SHORT_NAMES.get(name, name)


def read_model_info(folder: Path) -> dict[str, Any]:
    """What `download` wrote about the folder; empty where it did not make it."""
    return read_json(folder / MODEL_INFO) if (folder / MODEL_INFO).is_file() else {}


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep a second run out of the folder: both would write to the end of the same unfinished file."""
    from filelock import FileLock, Timeout  # noqa: PLC0415  # comes with huggingface-hub, and like it is slow to import

    unfinished = output / _UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(unfinished / "lock", timeout=0):
            yield
    except Timeout:
        raise ModelNotFoundError(
            f"another download into {output} is going on; wait for it, or choose another output folder"
        ) from None


def _check_output(output: Path, hub: "HubRepo") -> dict[str, Any]:
    """The model_info.json of an earlier download of the same model; raises CheckpointError where the folder holds anything else."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; choose another output folder")
    info = read_model_info(output)
    if info and info.get("repo") != hub.repo:
        raise CheckpointError(
            f"{output} holds {printable(str(info.get('repo')))}, not {hub.repo}; choose another output folder, or remove that one"
        )
    if not info and (output / "config.json").exists():
        raise CheckpointError(
            f"{output} holds a model that was not downloaded by nanovllm; choose another output folder, or remove that one"
        )
    return info


def _remove_superseded(output: Path, old: Mapping[str, Any], wanted: set[str]) -> None:
    """Make the folder one that is not a model, until it is complete, and leave no weights behind that the new revision does not have."""
    listed = old.get("files")
    for name in (
        "config.json",
        MODEL_INFO,
        *(set(listed if isinstance(listed, dict) else ()) - wanted),
    ):
        (output / Path(name).name).unlink(missing_ok=True)


def _check_space(output: Path, missing: list["HubFile"]) -> None:
    needed = sum((file.size_bytes or 0) - _unfinished_bytes(output, file) for file in missing)
    free = shutil.disk_usage(output).free
    if needed > free:
        sizes = f"{needed / 1e6:,.0f} MB are to be fetched, but {output} has room for {free / 1e6:,.0f} MB"
        raise ModelNotFoundError(f"{sizes}; free some space, or choose another output folder")


def _unfinished_path(output: Path, file: "HubFile") -> Path:
    return output / _UNFINISHED / f"{file.name}.{(file.sha256 or 'unknown')[:16]}"


def _unfinished_bytes(output: Path, file: "HubFile") -> int:
    """Bytes of the file that an earlier run left; only of files with a SHA-256, so that what they become can be checked."""
    path = _unfinished_path(output, file)
    if not file.sha256 or not file.size_bytes or not path.is_file():
        return 0
    size_bytes = path.stat().st_size
    return size_bytes if size_bytes <= file.size_bytes else 0


def _fetch(hub: "HubRepo", file: "HubFile", output: Path, config: GPT2Config) -> str:
    """Fetch the rest of one file, check it, move it to its place; returns its SHA-256."""
    unfinished = _unfinished_path(output, file)
    try:
        with unfinished.open("ab" if _unfinished_bytes(output, file) else "wb") as sink:
            hub.fetch(file.name, sink, _limit_bytes(file, config))
    except CheckpointError:  # too large
        unfinished.unlink()
        raise
    sha256 = _sha256_if_intact(unfinished, file)
    if sha256 is None:
        unfinished.unlink()
        raise CheckpointError(
            f"{file.name} of {hub.repo} arrived damaged: its size or checksum is not the hub's; it was removed, try again"
        )
    unfinished.replace(output / file.name)
    return sha256


def _limit_bytes(file: "HubFile", config: GPT2Config) -> int:
    """Limit of a file: of weights what the hub declares, or else what the network can need."""
    if not file.name.endswith(".safetensors"):
        return _MAX_COMPANION_BYTES
    if file.size_bytes is not None:
        return file.size_bytes
    return _MAX_PARAMETER_BYTES * config.num_parameters + _MAX_BUFFER_BYTES


def _sha256_if_intact(path: Path, file: "HubFile") -> str | None:
    """The SHA-256 of the file at `path`, or None if it is not what the hub says of `file`."""
    if not path.is_file() or file.size_bytes not in (None, path.stat().st_size):
        return None
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(
        b"blob %d\0" % path.stat().st_size, usedforsecurity=False
    )  # git's name for a file of this content
    with path.open("rb") as source:
        while chunk := source.read(_READ_BYTES):
            sha256.update(chunk)
            if file.git_sha1:
                git_sha1.update(chunk)
    agrees = file.sha256 in (None, sha256.hexdigest()) and file.git_sha1 in (
        None,
        git_sha1.hexdigest(),
    )
    return sha256.hexdigest() if agrees else None


def _write_model_info(
    output: Path, hub: "HubRepo", config: GPT2Config, sha256s: Mapping[str, str]
) -> None:
    info = {
        "repo": hub.repo,
        "asked_for": hub.asked_for,
        "revision": hub.commit,
        "downloaded_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "parameters": config.num_parameters,
        "vocab": config.vocab,
        "layers": config.layers,
        "heads": config.heads,
        "d_model": config.d_model,
        "context_length": config.max_positions,
        "files": {
            name: {"size_bytes": (output / name).stat().st_size, "sha256": sha256}
            for name, sha256 in sorted(sha256s.items())
        },
    }
    new = output / _UNFINISHED / MODEL_INFO
    new.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    new.replace(output / MODEL_INFO)
    shutil.rmtree(
        output / _UNFINISHED, ignore_errors=True
    )  # errors: systems that do not remove a lock that is held
