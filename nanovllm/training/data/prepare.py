"""Prepare the data of a run: read it, make the tokenizer, and encode both splits.

Memory: the whole text (see text.py) until it is encoded, about 100 MB while it is, and 2 bytes a
token afterwards, or 4 with a vocabulary above 65,536. A token file stays on disk, memory-mapped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from nanovllm.errors import TrainingError, counted
from nanovllm.model.tokenizer_files import END_OF_TEXT
from nanovllm.training.config import TrainingConfig
from nanovllm.training.data import examples
from nanovllm.training.data.dataset import Dataset
from nanovllm.training.data.text import (
    check_is_regular,
    read_documents,
    split_documents,
    without,
)
from nanovllm.training.data.tokenizer import encode_texts, make_tokenizer, token_lengths

ChatLoader: TypeAlias = Callable[[Path], examples.Chat | None]
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
    config: TrainingConfig,
    *,
    tokenizer: str,
    context: int,
    end_of_text_id: int | None = None,
    load_chat: ChatLoader | None = None,
) -> PreparedData:
    """Read the data of a run, text, examples or token files, and return its tokens in two splits.

    Args:
        config: names the data, and how to read and split it.
        tokenizer: "char", "bpe", or a path, as `make_tokenizer` takes it. A token file needs the
            path of the tokenizer that wrote it.
        context: tokens of a training sequence.
        end_of_text_id: token between two documents; None for that of `<|endoftext|>`, if any.
        load_chat: returns what renders conversations with the chat template of a model folder.

    Raises:
        TrainingError: the data, the tokenizer or a setting cannot be used.
    """
    paths = (*config.data_paths, *config.validation_paths)
    if any(path.suffix in _TOKEN_SUFFIXES for path in paths):
        return _from_token_files(config, tokenizer, context)
    if any(path.suffix == examples.SUFFIX for path in paths):
        chat = load_chat(Path(tokenizer)) if load_chat else None
        return _from_examples(config, tokenizer, context, end_of_text_id, chat)
    train, validation, files, warnings = _read_splits(config)
    try:
        # A character that occurs in the validation text alone must have a token, as in nanoGPT.
        learned_from = [*train, *validation] if tokenizer == "char" else train
        library = make_tokenizer(tokenizer, learned_from, config.vocab_size)
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
    config: TrainingConfig,
) -> tuple[list[str], list[str], tuple[Path, ...], tuple[str, ...]]:
    """Return the texts of both splits, the files that were read, and warnings for the user."""
    corpus = read_documents(config.data_paths, config.pattern)
    if not config.validation_paths:
        train, validation = split_documents(corpus.documents, config.validation_fraction)
        return train, validation, corpus.files, corpus.warnings
    held_out = read_documents(config.validation_paths, config.pattern)
    corpus = without(corpus, held_out)
    files, warnings = corpus.files + held_out.files, corpus.warnings + held_out.warnings
    return corpus.texts, held_out.texts, files, warnings


def _from_examples(
    config: TrainingConfig,
    spec: str,
    context: int,
    end_of_text_id: int | None,
    chat: examples.Chat | None,
) -> PreparedData:
    paths, held_out = config.data_paths, config.validation_paths
    files = (*paths, *held_out)
    for path in files:
        if path.suffix != examples.SUFFIX:
            raise TrainingError(f"{path}: give {examples.SUFFIX} files, or text files and folders")
    if len({path.resolve() for path in files}) < len(files):
        raise TrainingError(f"a file is given twice: {', '.join(map(str, files))}")
    try:
        train = [one for path in paths for one in examples.read_examples(path, chat)]
        validation = [one for path in held_out for one in examples.read_examples(path, chat)]
    finally:
        if chat is not None:
            chat.close()
    if not held_out and train:
        train, validation = examples.split_examples(train, config.validation_fraction)
    if not train or not validation:
        raise TrainingError(
            f"{paths[0]}: training and validation need an example each; give a line for each"
        )
    learned_from = [*train, *validation] if spec == "char" else train
    texts = [text for example in learned_from for text in example.texts]
    tokenizer = make_tokenizer(spec, texts, config.vocab_size)
    if end_of_text_id is None:
        end_of_text_id = tokenizer.token_to_id(END_OF_TEXT)
    splits = [
        Dataset(tokens, context, has_loss)
        for tokens, has_loss in (
            examples.encode_examples(tokenizer, split, end_of_text_id, f"Encoding the {name}")
            for name, split in (("training examples", train), ("validation examples", validation))
        )
    ]
    predicted = splits[1].tokens[splits[1].has_loss]
    return PreparedData(
        tokenizer,
        splits[0],
        splits[1],
        end_of_text_id,
        int(token_lengths(tokenizer)[predicted].sum()),
        files,
        _check_lengths(splits[0].tokens, splits[1].tokens, context),
    )


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
        raise TrainingError(f"{path} is not a token file: {reason}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        kind = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise TrainingError(f"{path} is {kind}, but must be one dimension of integers")
    return tokens


def _from_token_files(config: TrainingConfig, spec: str, context: int) -> PreparedData:
    paths, validation_paths = config.data_paths, config.validation_paths
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
    tokenizer = make_tokenizer(spec, (), config.vocab_size)
    lengths = token_lengths(tokenizer)
    train, *held_out = (_load_checked(path, len(lengths), spec) for path in files)
    boundary = int(len(train) * (1 - config.validation_fraction))
    train, validation = (train, *held_out) if held_out else (train[:boundary], train[boundary:])
    return PreparedData(
        tokenizer,
        Dataset(train, context),
        Dataset(validation, context),
        tokenizer.token_to_id(END_OF_TEXT),
        sum(int(lengths[chunk].sum()) for chunk in _chunks(validation)),
        files,
        _check_lengths(train, validation, context),
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
            f"the training text has {counted(len(train), 'token')}, but a context of {context:,} "
            f"needs at least {context + 1:,}: give more text, or lower the context (--context)"
        )
    if len(validation) < 2:
        raise TrainingError(
            f"the validation text has {counted(len(validation), 'token')}, but needs at least 2: "
            "give more text, or raise the part that is held out (--validation-fraction)"
        )
    if len(validation) < _FEW_VALIDATION_TOKENS:
        few = f"a loss of fewer than {_FEW_VALIDATION_TOKENS} is mostly chance"
        return (f"the validation text has {counted(len(validation), 'token')}; {few}",)
    return ()
