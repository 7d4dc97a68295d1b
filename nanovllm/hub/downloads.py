"""Download a model from the Hugging Face hub into a folder with a model_info.json.

huggingface-hub's snapshot_download discards an incomplete file, and a GPT-2 is one large file. Here
an incomplete file is kept under the hub's checksum of it, resumed by the next run, and verified
against that checksum. huggingface-hub is imported on use, because its import takes longer than the
rest of the package.
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
from nanovllm.model.config import ModelConfig, read_json

if TYPE_CHECKING:
    from nanovllm.hub.repo import HubFile, HubRepo

MODEL_INFO = "model_info.json"
SHORT_NAMES = {
    "gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}  # fmt: skip
_INCOMPLETE = ".download"  # folder for incomplete files, inside of the output
_READ_BYTES = 1 << 20
_MAX_COMPANION_BYTES = 64 << 20  # of any file but the weights
_MAX_PARAMETER_BYTES, _MAX_BUFFER_BYTES = 8, 1 << 30  # causal masks of old checkpoints are buffers


def download(
    name: str,
    output: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download the model `name` into the folder `output`, and return `output`.

    An interrupted download is resumed. Every file is verified against the hub's checksum.
    config.json is written last: a folder without it is not a model.

    Args:
        revision: branch, tag or commit; None for the main branch.
        token: access token for gated and private models; None for HF_TOKEN.
        endpoint: URL of the hub; None for HF_ENDPOINT.

    Raises:
        CheckpointError: no checkpoint that can be loaded, a wrong checksum, or `output` holds
            another model.
        ModelNotFoundError: the hub refuses it, or the disk is too small; the message names the
            remedy.
    """
    from nanovllm.hub.repo import HubRepo, explained  # noqa: PLC0415 - slow to import

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
    """Return the repository of a short name such as "gpt2"; other names are unchanged."""
    return SHORT_NAMES.get(name, name)


def read_model_info(folder: Path) -> dict[str, Any]:
    """Return a folder's model_info.json; empty if `download` did not make it."""
    return read_json(folder / MODEL_INFO) if (folder / MODEL_INFO).is_file() else {}


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Lock the folder against a second download, which would append to the same file."""
    from filelock import FileLock, Timeout  # noqa: PLC0415 - slow to import

    incomplete = output / _INCOMPLETE
    incomplete.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(incomplete / "lock", timeout=0):
            yield
    except Timeout:
        raise ModelNotFoundError(
            f"another download into {output} is running; wait for it, or choose another output "
            "folder"
        ) from None


def _check_output(output: Path, hub: "HubRepo") -> dict[str, Any]:
    """Return an earlier download's model_info.json; raises CheckpointError for another model."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output} is a file; choose another output folder")
    info = read_model_info(output)
    if info and info.get("repo") != hub.repo:
        raise CheckpointError(
            f"{output} holds {printable(str(info.get('repo')))}, not {hub.repo}; "
            "choose another output folder, or remove that one"
        )
    if not info and (output / "config.json").exists():
        raise CheckpointError(
            f"{output} holds a model that was not downloaded by nanovllm; "
            "choose another output folder, or remove that one"
        )
    return info


def _remove_superseded(output: Path, old: Mapping[str, Any], names: set[str]) -> None:
    """Remove config.json, so that the folder is not a model meanwhile, and files not in `names`."""
    files = old.get("files")
    superseded = set(files if isinstance(files, dict) else ()) - names
    for name in ("config.json", MODEL_INFO, *superseded):
        (output / Path(name).name).unlink(missing_ok=True)


def _check_space(output: Path, missing: list["HubFile"]) -> None:
    needed = sum((file.size_bytes or 0) - _incomplete_bytes(output, file) for file in missing)
    free = shutil.disk_usage(output).free
    if needed > free:
        raise ModelNotFoundError(
            f"the download needs {needed / 1e6:,.0f} MB, but {output} has room for "
            f"{free / 1e6:,.0f} MB; free some space, or choose another output folder"
        )


def _incomplete_path(output: Path, file: "HubFile") -> Path:
    return output / _INCOMPLETE / f"{file.name}.{(file.sha256 or 'unknown')[:16]}"


def _incomplete_bytes(output: Path, file: "HubFile") -> int:
    """Return the bytes of a file to resume; 0 for a file without SHA-256 to verify it."""
    path = _incomplete_path(output, file)
    if not file.sha256 or not file.size_bytes or not path.is_file():
        return 0
    size_bytes = path.stat().st_size
    return size_bytes if size_bytes <= file.size_bytes else 0


def _fetch(hub: "HubRepo", file: "HubFile", output: Path, config: ModelConfig) -> str:
    """Download the rest of a file, verify and move it; return its SHA-256."""
    incomplete = _incomplete_path(output, file)
    try:
        with incomplete.open("ab" if _incomplete_bytes(output, file) else "wb") as sink:
            hub.fetch(file.name, sink, _limit_bytes(file, config))
    except CheckpointError:  # too large
        incomplete.unlink()
        raise
    sha256 = _sha256_if_intact(incomplete, file)
    if sha256 is None:
        incomplete.unlink()
        raise CheckpointError(
            f"{file.name} of {hub.repo} arrived damaged: its size or checksum is not the hub's; "
            "it was removed, try again"
        )
    incomplete.replace(output / file.name)
    return sha256


def _limit_bytes(file: "HubFile", config: ModelConfig) -> int:
    """Return a file's size limit: for weights, the declared size or a bound from the config."""
    if not file.name.endswith(".safetensors"):
        return _MAX_COMPANION_BYTES
    if file.size_bytes is not None:
        return file.size_bytes
    return _MAX_PARAMETER_BYTES * config.num_parameters + _MAX_BUFFER_BYTES


def _sha256_if_intact(path: Path, file: "HubFile") -> str | None:
    """Return the SHA-256 of a local file, or None if it differs from the hub's `file`."""
    if not path.is_file() or file.size_bytes not in (None, path.stat().st_size):
        return None
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
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
    output: Path, hub: "HubRepo", config: ModelConfig, sha256s: Mapping[str, str]
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
    new = output / _INCOMPLETE / MODEL_INFO
    new.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    new.replace(output / MODEL_INFO)
    # Windows does not remove the lock file, which is held.
    shutil.rmtree(output / _INCOMPLETE, ignore_errors=True)
