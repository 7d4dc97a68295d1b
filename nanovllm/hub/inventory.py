"""List and remove the models and compiled kernels on this machine.

Files are removed only from the Hugging Face cache and the folder of compiled kernels.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nanovllm.config import BUNDLED_MODELS
from nanovllm.errors import NanovllmError
from nanovllm.hub.downloads import read_model_info
from nanovllm.hub.names import bundled_folder
from nanovllm.model.config import read_json
from nanovllm.model.families.registry import MODEL_TYPES
from nanovllm.model.kernels.build.object_cache import SUFFIXES, user_cache

KERNELS = "kernels"
BUNDLED, FOLDER, HUB_CACHE, COMPILED = "bundled", "download", "hub cache", "compiled"


class RemovalError(NanovllmError):
    """An item that nanovllm does not remove, or could not remove."""


@dataclass(frozen=True, slots=True)
class StoredItem:
    """A model, or the compiled kernels, on this machine.

    Attributes:
        name: its argument in commands.
        kind: BUNDLED, FOLDER, HUB_CACHE or COMPILED.
        modified_s: time of the last change, in seconds since 1970; None if there are no files.
    """

    name: str
    kind: str
    folder: Path
    size_bytes: int
    modified_s: float | None


def stored_items(models_dir: Path = Path("models")) -> list[StoredItem]:
    """Return the bundled models, downloads, cached models and kernels."""
    return [
        *(_folder_item(name, BUNDLED, bundled_folder(name)) for name in BUNDLED_MODELS),
        *_downloads(models_dir),
        *_cached_models(),
        _compiled(),
    ]


def kernel_files() -> list[Path]:
    """Return the files of compiled kernels."""
    return _cached_files(user_cache().suffix)


def _cached_files(*suffixes: str) -> list[Path]:
    folder = user_cache().folder
    with suppress(OSError):
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix in suffixes and path.is_file() and not path.is_symlink()
        )
    return []


def remove_item(item: StoredItem) -> None:
    """Remove a cached model, or the kernels and what was measured for them; raises RemovalError."""
    check_removable(item)
    if item.kind == COMPILED:
        for path in _cached_files(*SUFFIXES):
            path.unlink(missing_ok=True)
        return
    _remove_cached(item)


def check_removable(item: StoredItem) -> None:
    """Raise RemovalError for the bundled models and the user's folders."""
    if item.kind == BUNDLED:
        raise RemovalError(f"{item.name} is part of nanovllm and stays")
    if item.kind == FOLDER:
        raise RemovalError(
            f"{item.folder} is a folder of yours, which nanovllm leaves alone; remove it yourself"
        )


def _folder_item(name: str, kind: str, folder: Path) -> StoredItem:
    return _item(name, kind, folder, (path for path in folder.rglob("*") if path.is_file()))


def _item(name: str, kind: str, folder: Path, files: Iterable[Path]) -> StoredItem:
    sizes, times = [0], []
    for path in files:
        with suppress(OSError):  # removed meanwhile
            status = path.stat()
            sizes.append(status.st_size)
            times.append(status.st_mtime)
    return StoredItem(name, kind, folder, sum(sizes), max(times, default=None))


def _downloads(models_dir: Path) -> Iterator[StoredItem]:
    """Yield the downloads below `models_dir`."""
    with suppress(OSError):
        for folder in sorted(models_dir.iterdir()):
            if (folder / "config.json").is_file() and read_model_info(folder):
                yield _folder_item(f"./{folder.as_posix()}", FOLDER, folder)


def _compiled() -> StoredItem:
    return _item(KERNELS, COMPILED, user_cache().folder, kernel_files())


def _cached_models() -> Iterator[StoredItem]:
    """Yield the models of a known family in the Hugging Face cache, which other programs use."""
    from huggingface_hub import constants, scan_cache_dir  # noqa: PLC0415 - slow to import
    from huggingface_hub.errors import CacheNotFound  # noqa: PLC0415

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError, OSError):
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        folders = [revision.snapshot_path for revision in repo.revisions]
        if repo.repo_type == "model" and any(map(_has_family, folders)):
            yield StoredItem(
                repo.repo_id, HUB_CACHE, repo.repo_path, repo.size_on_disk, repo.last_modified
            )


def _has_family(folder: Path) -> bool:
    try:
        return read_json(folder / "config.json").get("model_type") in MODEL_TYPES
    except (OSError, NanovllmError):
        return False


def _remove_cached(item: StoredItem) -> None:
    """Remove a repository with huggingface_hub.

    huggingface_hub selects revisions by commit, and a fork may have the same commits. So it gets a
    cache listing with this repository only.
    """
    from huggingface_hub import constants, scan_cache_dir  # noqa: PLC0415 - slow to import

    cache = Path(constants.HF_HUB_CACHE).resolve()
    if item.folder.is_symlink() or item.folder.resolve().parent != cache:
        raise RemovalError(f"{item.folder} is not inside of {cache}; remove it yourself")
    listing = scan_cache_dir(cache)
    only = frozenset(
        repo for repo in listing.repos if repo.repo_path.resolve() == item.folder.resolve()
    )
    commits = {revision.commit_hash for repo in only for revision in repo.revisions}
    replace(listing, repos=only).delete_revisions(*commits).execute()
    if item.folder.exists():
        raise RemovalError(f"{item.folder} could not be removed completely; check its permissions")
