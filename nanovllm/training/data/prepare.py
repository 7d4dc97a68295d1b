"""Prepare the data of a run: read it, make the tokenizer, and encode both splits.

Memory: the whole text (see text.py) until it is encoded, about 100 MB while it is, and 2 bytes a
token afterwards, or 4 with a vocabulary above 65,536. A token file stays on disk, memory-mapped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from nanovllm.errors import TrainingError
from nanovllm.model.tokenizer_files import END_OF_TEXT
from nanovllm.training.data.dataset import Dataset
from nanovllm.training.data.text import (
    Corpus,
    check_is_regular,
    read_documents,
    split_documents,
    without,
)
from nanovllm.training.data.tokenizer import (
    encode_texts,
    make_tokenizer,
    token_lengths,
)

_TOKEN_SUFFIXES = (".npy", ".bin")
_FEW_VALIDATION_TOKENS = 100  # the loss of fewer is mostly chance
_CHUNK = 2**22  # tokens of a memory-mapped file that are read together


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The two splits of the data, and the tokenizer that encoded them.

    Attributes:
        end_of_text_id: token between two documents; None if the tokenizer has none.
        validation_bytes: length of the validation text in UTF-8, for bits per byte.
        files: the files that were read.
        warnings: for the user, such as the number of files that were skipped.
    """

    tokenizer: Tokenizer
    train: Dataset
    validation: Dataset
    end_of_text_id: int | None
    validation_bytes: int
    files: tuple[Path, ...]
    warnings: tuple[str, ...]


def prepare_data(
    paths: Sequence[Path],
    *,
    validation_paths: Sequence[Path] = (),
    tokenizer: str,
    context: int,
    pattern: str = "*.txt",
    vocab_size: int | None = None,
    validation_fraction: float = 0.1,
    end_of_text_id: int | None = None,
) -> PreparedData:
    """Read text or a token file, and return its tokens in two splits.

    Args:
        paths: text files and folders of them; or one token file, .npy, or .bin as nanoGPT writes it
            (uint16 without a header).
        validation_paths: the same, for validation; none for the end of `paths`. Their files are
            left out of the training text.
        tokenizer: "char", "bpe", or a path, as `make_tokenizer` takes it. A token file needs the
            path of the tokenizer that wrote it.
        context: tokens of a training sequence.
        pattern: glob pattern of the files to read in folders.
        vocab_size: number of tokens of a new tokenizer.
        validation_fraction: part of the text, at its end, that is held out.
        end_of_text_id: token between two documents; None for that of `<|endoftext|>`, if any.

    Raises:
        TrainingError: the data, the tokenizer or a setting is unusable.
    """
    if any(path.suffix in _TOKEN_SUFFIXES for path in (*paths, *validation_paths)):
        return _from_token_files(
            paths, validation_paths, tokenizer, vocab_size, context, validation_fraction
        )
    train, validation, files, warnings = _read_splits(
        paths, validation_paths, pattern, validation_fraction
    )
    try:
        # A character that occurs in the validation text alone must have a token, as in nanoGPT.
        learned_from = [*train, *validation] if tokenizer == "char" else train
        library = make_tokenizer(tokenizer, learned_from, vocab_size)
        if end_of_text_id is None:
            end_of_text_id = library.token_to_id(END_OF_TEXT)
        train_tokens = encode_texts(library, train, end_of_text_id, "Encoding the training text")
        validation_tokens = encode_texts(
            library, validation, end_of_text_id, "Encoding the validation text"
        )
        few = _check_lengths(train_tokens, validation_tokens, context)
    except TrainingError as error:  # files that were skipped may be the reason
        raise TrainingError("\n".join([*warnings, str(error)])) from error
    return PreparedData(
        library,
        Dataset(train_tokens, context),
        Dataset(validation_tokens, context),
        end_of_text_id,
        sum(len(text.encode()) for text in validation),
        files,
        (*warnings, *few),
    )


def _read_splits(
    paths: Sequence[Path],
    validation_paths: Sequence[Path],
    pattern: str,
    validation_fraction: float,
) -> tuple[Sequence[str], Sequence[str], tuple[Path, ...], tuple[str, ...]]:
    """Return the texts of both splits, the files that were read, and warnings for the user."""
    corpus = read_documents(paths, pattern)
    if validation_paths:
        held_out = read_documents(validation_paths, pattern)
        corpus = without(corpus, held_out)
        train, validation = corpus.texts, held_out.texts
    else:
        held_out = Corpus((), ())
        train, validation = split_documents(corpus.documents, validation_fraction)
    files = tuple(document.path for document in (*corpus.documents, *held_out.documents))
    return train, validation, files, (*corpus.warnings, *held_out.warnings)


def load_tokens(path: Path) -> Integer[np.ndarray, " tokens"]:
    """Return the tokens of a file, memory-mapped.

    Args:
        path: .npy of one dimension and an integer type, or .bin: uint16, little-endian.

    Raises:
        TrainingError: the file cannot be read, or has other contents.
    """
    try:
        check_is_regular(path)
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.stat().st_size % 2 == 0:
            tokens = np.memmap(path, "<u2", "r")
        else:
            raise TrainingError(f"{path} has an odd number of bytes, but must be uint16 tokens")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        if isinstance(error, TrainingError):
            raise
        reason = "it has no header of NumPy" if "pickle" in str(error) else error
        raise TrainingError(f"{path} is no token file: {reason}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        kind = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise TrainingError(f"{path} is {kind}, but must be one dimension of integers")
    return tokens


def _from_token_files(
    paths: Sequence[Path],
    validation_paths: Sequence[Path],
    spec: str,
    vocab_size: int | None,
    context: int,
    validation_fraction: float,
) -> PreparedData:
    files = (*paths, *validation_paths)
    has_text = any(path.suffix not in _TOKEN_SUFFIXES for path in files)
    if has_text or len(paths) > 1 or len(validation_paths) > 1:
        names = " and ".join(map(str, files[:2]))
        raise TrainingError(f"{names}: give one token file, or text files and folders only")
    if validation_paths and paths[0].resolve() == validation_paths[0].resolve():
        raise TrainingError(f"{paths[0]} is training and validation data; give two files")
    if spec in {"char", "bpe"}:
        raise TrainingError(
            f"{files[0]} has tokens, from which no {spec} tokenizer can be made; give the "
            "tokenizer that wrote them (--tokenizer gpt2 or PATH)"
        )
    tokenizer = make_tokenizer(spec, (), vocab_size)
    lengths = token_lengths(tokenizer)
    train, *held_out = (_load_checked(path, len(lengths), spec) for path in files)
    if held_out:
        (validation,) = held_out
    else:
        boundary = int(len(train) * (1 - validation_fraction))
        train, validation = train[:boundary], train[boundary:]
    few = _check_lengths(train, validation, context)
    return PreparedData(
        tokenizer,
        Dataset(train, context),
        Dataset(validation, context),
        tokenizer.token_to_id(END_OF_TEXT),
        sum(int(lengths[chunk].sum()) for chunk in _chunks(validation)),
        files,
        few,
    )


def _load_checked(path: Path, vocab: int, spec: str) -> Integer[np.ndarray, " tokens"]:
    """Return the tokens of a file; raise TrainingError if the tokenizer lacks one."""
    tokens = load_tokens(path)
    for chunk in _chunks(tokens):
        if chunk.min() < 0 or chunk.max() >= vocab:
            wrong = chunk[(chunk < 0) | (chunk >= vocab)][0]
            raise TrainingError(
                f"{path} has token {wrong}, but the tokenizer {spec} has tokens 0 to {vocab - 1}; "
                "give the tokenizer that wrote the file (--tokenizer)"
            )
    return tokens


def _chunks(tokens: Integer[np.ndarray, " tokens"]) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), _CHUNK):
        yield tokens[start : start + _CHUNK]


def _check_lengths(
    train: Integer[np.ndarray, " train"],
    validation: Integer[np.ndarray, " validation"],
    context: int,
) -> tuple[str, ...]:
    """Return a warning if there are few validation tokens; raise TrainingError for no window."""
    if len(train) <= context:
        raise TrainingError(
            f"the training text has {len(train):,} tokens, but a context of {context:,} needs at "
            f"least {context + 1:,}: give more text, or lower the context (--context)"
        )
    if len(validation) < 2:
        raise TrainingError(
            f"the validation text has {len(validation)} tokens, but needs at least 2: give more "
            "text, or raise the part that is held out (--validation-fraction)"
        )
    if len(validation) < _FEW_VALIDATION_TOKENS:
        warning = (
            f"the validation text has {len(validation)} tokens; a loss of fewer than "
            f"{_FEW_VALIDATION_TOKENS} is mostly chance"
        )
        return (warning,)
    return ()
