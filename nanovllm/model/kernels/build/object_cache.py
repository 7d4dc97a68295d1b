"""A folder of compiled code, so that it is compiled once on a machine and not once in a process.

    <key>.kernels     "nanovllm kernels" and a line feed | SHA-256 of the rest | object file

A file is written beside its place and then moved there, so nobody ever reads half of one; should one be damaged all the same, its checksum
says so. What is read here is run: the folder must belong to this user, and nobody else may write to it. Of several processes that lack the same
code one compiles it and the others wait, by a lock on <key>.lock, which ends with the process that has it.
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
_KEEP = 32  # files of 0.1 MB: each pair of types, processor, setting and version has one
_ABANDONED_S = 3600  # by then whoever was writing a file, or held a lock, is no more
_MAGIC = b"nanovllm kernels\n"
_SUFFIX, _LOCK = ".kernels", ".lock"
_CHECKSUM_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class ObjectCache:
    """Compiled code by its key; where the folder cannot be used, nothing is found and nothing kept."""

    folder: Path

    def load(self, key: str) -> bytes | None:
        """What was saved under a key, unless it is not there, damaged, or in a folder that somebody else may write to."""
        path = self.folder / f"{key}{_SUFFIX}"
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
            os.utime(path)  # what is used stays
        return image

    def save(self, key: str, image: bytes) -> bool:
        """Keep compiled code, and only the newest of the older; returns whether it could be kept."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private():
                return False
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".tmp", delete=False) as file:
                file.write(_MAGIC + hashlib.sha256(image).digest() + image)
            Path(file.name).replace(self.folder / f"{key}{_SUFFIX}")
        except OSError:
            return False
        self._prune()
        return True

    @contextmanager
    def exclusive(self, key: str) -> Iterator[None]:
        """Let processes into what follows one after the other; all of them where there are no such locks, or the folder cannot be used."""
        with ExitStack() as held:
            with suppress(OSError, ImportError):
                import fcntl  # noqa: PLC0415 - not on Windows

                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._is_private():
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
        found = self.folder.stat()
        if sys.platform == "win32":  # folders of a user are closed to others there
            return stat.S_ISDIR(found.st_mode)
        return (
            stat.S_ISDIR(found.st_mode)
            and found.st_uid == os.geteuid()
            and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )

    def _prune(self) -> None:
        now = time.time()
        ages: list[tuple[float, Path]] = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                age = now - path.stat().st_mtime
                if path.suffix == _SUFFIX:
                    ages.append((age, path))
                elif path.suffix in (".tmp", _LOCK) and age > _ABANDONED_S:
                    path.unlink()
        for _, path in sorted(ages)[_KEEP:]:
            with suppress(OSError):
                path.unlink()


def user_cache() -> ObjectCache:
    """The compiled code of this user, in the folder `kernels` of `user_cache_folder`."""
    return ObjectCache(user_cache_folder() / "kernels")


def user_cache_folder() -> Path:
    """The folder of NANOVLLM_CACHE_DIR, or else where this system keeps a user's caches."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "nanovllm"
    home = (
        Path("~").expanduser()
    )  # "~" itself where there is no home: no cache is found there, and none can be made
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "nanovllm"
