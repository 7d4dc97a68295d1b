"""A folder of compiled code, so that a machine compiles once and not every process.

    <key>.kernels     "nanovllm kernels" and a line feed | SHA-256 of the rest | object file
    <key>.measured    the same, with what was measured of this CPU as JSON (peak.py)

A file is written under a temporary name and then renamed, so no reader sees half a file. A damaged
file fails its checksum. Code that is loaded is run, so the folder must belong to this user and be
writable by nobody else. Where several processes lack the same code, one compiles it while the
others wait for a lock on <key>.lock; the lock ends with its process.
"""

import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "NANOVLLM_CACHE_DIR"
_KEEP = 32  # files of 0.1 MB: one for each pair of types, CPU, setting and version
_ABANDONED_S = 3600  # whoever wrote a file or held a lock has ended by then
_MAGIC = b"nanovllm kernels\n"
KERNELS, MEASURED, _LOCK, _TEMPORARY = SUFFIXES = (".kernels", ".measured", ".lock", ".tmp")
_CHECKSUM_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class ObjectCache:
    """Files of one suffix by key. In a folder that cannot be used nothing is found or kept."""

    folder: Path
    suffix: str = KERNELS

    def load(self, key: str) -> bytes | None:
        """Return what was saved under a key; None if missing, damaged or writable by others."""
        path = self.folder / f"{key}{self.suffix}"
        try:
            if not self._is_private():
                return None
            content = path.read_bytes()
        except OSError:
            return None
        start = len(_MAGIC) + _CHECKSUM_BYTES
        image = content[start:]
        if content[:start] != _MAGIC + hashlib.sha256(image).digest():
            return None
        with suppress(OSError):
            os.utime(path)  # `_prune` keeps the files used last
        return image

    def save(self, key: str, image: bytes) -> bool:
        """Save an object file and delete the least recently used; return whether it was saved."""
        try:
            if not self.is_usable():
                return False
            with tempfile.NamedTemporaryFile(
                dir=self.folder, suffix=_TEMPORARY, delete=False
            ) as file:
                file.write(_MAGIC + hashlib.sha256(image).digest() + image)
            Path(file.name).replace(self.folder / f"{key}{self.suffix}")
        except OSError:
            return False
        self._prune()
        return True

    def is_usable(self) -> bool:
        """Make the folder; return whether files can be kept there, safe from other users."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._is_private() and os.access(self.folder, os.W_OK)
        except OSError:
            return False

    @contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """Hold the lock of a key; do nothing without file locks or where the folder is unusable."""
        with ExitStack() as held:
            with suppress(OSError, ImportError):
                import fcntl  # noqa: PLC0415 - missing on Windows

                if self.is_usable():
                    lock = held.enter_context((self.folder / f"{key}{_LOCK}").open("wb"))
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        print(
                            "nanovllm: waiting for another process that compiles the same kernels",
                            file=sys.stderr,
                        )
                        fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_private(self) -> bool:
        info = self.folder.stat()
        if not stat.S_ISDIR(info.st_mode):
            return False
        if sys.platform == "win32":  # a user's folders are closed to others there
            return True
        return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def _prune(self) -> None:
        now = time.time()
        ages: list[tuple[float, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                age = now - path.stat().st_mtime
                if path.suffix == self.suffix:
                    ages.append((age, path))
                elif path.suffix in (_TEMPORARY, _LOCK) and age > _ABANDONED_S:
                    path.unlink()
        for _, path in sorted(ages)[_KEEP:]:
            with suppress(OSError):
                path.unlink()


def user_cache(suffix: str = KERNELS) -> ObjectCache:
    """Return this user's cache of compiled code, or of what was measured."""
    return ObjectCache(user_cache_folder() / "kernels", suffix)


def user_cache_folder() -> Path:
    """Return the folder of NANOVLLM_CACHE_DIR, or else the system's place for user caches."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "nanovllm"
    home = Path("~").expanduser()  # without a home "~" itself, where no cache can be made
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "nanovllm"
