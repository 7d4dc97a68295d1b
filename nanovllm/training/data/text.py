"""Text files and folders of them: read the documents, and split off the validation text.

All text is held in memory: a character takes one byte where the document is ASCII, and at most
four. 1 GB of source code needs about 1 GB until it is tokenized.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from nanovllm.errors import TrainingError, counted
from nanovllm.progress import progress_bar

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BYTE_ORDER_MARK = "\ufeff"
_SKIPPED_FOLDERS = ("__pycache__", "node_modules")
_VIRTUAL_ENVIRONMENT = "pyvenv.cfg"  # the file that marks one
_LINE_START = re.compile(r"^", re.MULTILINE)
_WORD_END = re.compile(r"(?<=\S)(?=\s)")  # a word's token has the space before it
_MAX_LINE = 10_000  # characters; a longer line may be cut


@dataclass(frozen=True, slots=True)
class Document:
    """The text of one file, with Unix line ends and without a byte order mark."""

    path: Path
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in reading order, and a warning for each folder with files that were skipped."""

    documents: tuple[Document, ...]
    warnings: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """The text of each document."""
        return [document.text for document in self.documents]

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of each document."""
        return tuple(document.path for document in self.documents)


def read_documents(paths: Sequence[Path], pattern: str = "*.txt") -> Corpus:
    """Read text files, and the files of folders whose names match a glob pattern.

    Folders are searched recursively, without following links to folders; their files are sorted by
    path. Folders in them are skipped that are hidden (.git), hold no sources (__pycache__,
    node_modules), or are virtual environments. A file that several paths lead to is read once.
    Empty files of folders are left out. Files of folders that are unreadable or not UTF-8 text are
    skipped and counted in a warning.

    Raises:
        TrainingError: a path does not exist, a named file is empty, unreadable or not UTF-8 text, a
            folder has no file that matches, or there is no text.
    """
    documents: dict[Path, Document] = {}
    warnings: list[str] = []
    with progress_bar(desc="Reading", unit=" files", delay=0.5, leave=False) as bar:
        for path in paths:
            files = _files_of(path, pattern)
            skipped: list[TrainingError] = []
            for file in files:
                bar.update()
                try:
                    documents.setdefault(file.resolve(), Document(file, read_text(file)))
                except TrainingError as error:
                    if not path.is_dir():
                        raise
                    skipped.append(error)
            if skipped:
                warnings.append(
                    f"{path}: skipped {len(skipped):,} of {counted(len(files), 'file')} that match "
                    f"{pattern!r}; the first: {skipped[0]}"
                )
    with_text = tuple(document for document in documents.values() if document.text)
    if not with_text:
        raise TrainingError("\n  ".join([f"{_listed(paths)}: there is no text", *warnings]))
    return Corpus(with_text, tuple(warnings))


def without(corpus: Corpus, held_out: Corpus) -> Corpus:
    """Return the corpus without the files of another, and a warning that names one of them.

    Raises:
        TrainingError: no file is left.
    """
    others = {path.resolve() for path in held_out.files}
    is_kept = [path.resolve() not in others for path in corpus.files]
    kept = tuple(compress(corpus.documents, is_kept))
    if len(kept) == len(is_kept):
        return corpus
    both = corpus.files[is_kept.index(False)]
    if not kept:
        raise TrainingError(
            f"{both} and all other training text is validation data; give other text"
        )
    warning = (
        f"{len(is_kept) - len(kept):,} of {len(is_kept):,} files are validation data and left out "
        f"of the training text; the first: {both}"
    )
    return Corpus(kept, (*corpus.warnings, warning))


def split_documents(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[str], list[str]]:
    """Return the training texts and the validation texts, which are the end of the whole text.

    The boundary of N characters is int(N * (1 - validation_fraction)), as in nanoGPT, moved to the
    nearest line end or else white space by at most a tenth of the smaller part, so that no line and
    no word is cut. The document at the boundary is cut in two.

    `validation_fraction` is above 0 and below 1.
    """
    characters = sum(len(document.text) for document in documents)
    left = int(characters * (1 - validation_fraction))
    reach = min(left, characters - left) // 10
    train: list[str] = []
    validation: list[str] = []
    for document in documents:
        text = document.text
        if 0 < left < len(text):
            left = _boundary(text, left, min(reach, _MAX_LINE))
        train += [text[:left]] if left > 0 else []
        validation += [text[left:]] if left < len(text) else []
        left = max(0, left - len(text))
    return train, validation


def _boundary(text: str, offset: int, reach: int) -> int:
    """Return the offset nearest to `offset`, at most `reach` away, that cuts no line or word."""
    end = offset + reach + 1
    for pattern in (_LINE_START, _WORD_END):
        found = [match.start() for match in pattern.finditer(text, max(0, offset - reach), end)]
        found += [len(text)]  # the end of a document is one of a line and of a word
        nearest = min(found, key=lambda one: abs(one - offset))
        if abs(nearest - offset) <= reach:
            return nearest
    return offset


def check_is_regular(path: Path) -> None:
    """Raise TrainingError for a pipe or a device, OSError if there is no such path."""
    mode = path.stat().st_mode
    if not (S_ISREG(mode) or S_ISDIR(mode)):
        raise TrainingError(
            f"{path} is a pipe or a device, which may have no end; save its contents to a file"
        )


def pieces(text: str, max_length: int = 65536) -> Iterator[str]:
    """Yield consecutive parts of a text, which byte-level BPE encodes as it encodes the whole.

    A part ends between a character and a space after it, where the pre-tokenizer of GPT-2 always
    splits; without a space between a character and a line end; without both after `max_length`
    characters, where at most the tokens at the cut differ.
    """
    start = 0
    while len(text) - start > max_length:
        end = start + max_length
        end = _cut(text, " ", start, end) or _cut(text, "\n", start, end) or end
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, white_space: str, start: int, end: int) -> int | None:
    """Return the last offset of `white_space` after a visible character; None without one."""
    offset = text.rfind(white_space, start + 1, end)
    while offset > 0 and text[offset - 1].isspace():
        offset = text.rfind(white_space, start + 1, offset)
    return offset if offset > 0 else None


def _files_of(path: Path, pattern: str) -> list[Path]:
    """Return a file itself, or the files of a folder that match, sorted."""
    try:
        if not path.is_dir():
            check_is_regular(path)
            return [path]
        files = sorted(_search(path, pattern))
    except FileNotFoundError:
        raise TrainingError(
            f"{path} does not exist; give a text file, or a folder of text files"
        ) from None
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from None
    except TrainingError:
        raise
    except (ValueError, NotImplementedError, IndexError) as error:
        raise TrainingError(
            f"pattern is {pattern!r} but must be a glob pattern such as *.txt or *.py: {error}"
        ) from None
    if not files:
        suffixes = Counter(file.suffix for file in _search(path, "*.*"))
        listed = ", ".join(f"{count:,} *{name}" for name, count in suffixes.most_common(5))
        raise TrainingError(
            f"{path} has no file that matches {pattern!r}"
            + (f" (it has {listed})" if listed else "")
            + "; set the pattern (--pattern)"
        )
    return files


def _search(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the files that match, except those in skipped folders below `folder`."""
    skipped = {folder: False}

    def is_skipped(inner: Path) -> bool:
        if inner not in skipped:
            skipped[inner] = is_skipped(inner.parent) or (
                inner.name.startswith(".")
                or inner.name in _SKIPPED_FOLDERS
                or _is_file(inner / _VIRTUAL_ENVIRONMENT)
            )
        return skipped[inner]

    return (
        file for file in folder.rglob(pattern) if _is_file(file) and not is_skipped(file.parent)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder without permission to search it
        return False


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def read_text(file: Path) -> str:
    """Return the text of a file; raise TrainingError if it is unreadable or not UTF-8 text."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TrainingError(f"{file} cannot be read: {error.strerror or error}") from None
    if data.startswith(_UTF16_MARKS):
        raise TrainingError(f"{file} is UTF-16; convert it to UTF-8")
    nul = data.find(b"\0")
    if nul >= 0:
        raise TrainingError(f"{file} is binary data: byte {nul} is zero; give UTF-8 text")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        offset = error.start
        raise TrainingError(
            f"{file} is not UTF-8: byte {offset} is 0x{data[offset]:02x}; convert it to UTF-8"
        ) from None
    text = text.lstrip(_BYTE_ORDER_MARK)  # files that were joined may begin with several
    return text.replace("\r\n", "\n").replace("\r", "\n")
