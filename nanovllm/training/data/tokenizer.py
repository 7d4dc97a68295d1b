"""Tokenizers for training: train or load one, encode texts with it, and save it as tokenizer.json.

- `char`: a token for each character of the text, as in nanoGPT. It has no special tokens, and
  cannot encode other characters. The vocabulary spells a character as GPT-2's does: the bytes of
  its UTF-8 form, each as a printable character. So the server decodes it as a byte-level tokenizer.
- `bpe`: byte-level BPE (Radford et al. 2019, section 2.2) trained on the text. It encodes any text.
- a path: the tokenizer.json, or vocab.json and merges.txt, of a model folder.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm.errors import CheckpointError, TrainingError
from nanovllm.model.token_spelling import find_spelling
from nanovllm.model.tokenizer_files import (
    END_OF_TEXT,
    byte_level,
    load_tokenizer_files,
    without_prefix,
)
from nanovllm.progress import progress_bar
from nanovllm.training.atomic_files import write_bytes
from nanovllm.training.data.text import pieces

_DEFAULT_VOCAB_SIZE = 1024
_SMALLEST_BPE = 257  # the bytes and `<|endoftext|>`
_COPIED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MAX_WORD_CHARACTERS = 2**12
"""Longest word that BPE is trained on: a merge takes the square of a word's length, and text
without spaces is one word."""
_BATCH_CHARACTERS = 2**20
"""Characters that are encoded at once: the library needs about 100 MB for them."""


def make_tokenizer(spec: str, texts: Sequence[str], vocab_size: int | None = None) -> Tokenizer:
    """Return a tokenizer that is trained on the texts, or loaded from files.

    Args:
        spec: "char", "bpe", a model folder, or a tokenizer.json. The command line replaces "gpt2"
            by the folder of a local copy (nanovllm.hub), which training cannot look up.
        texts: texts to train on.
        vocab_size: number of tokens, including `<|endoftext|>`; None for 1,024 or as many as the
            text gives, whichever is less.

    Raises:
        TrainingError: the spec names no tokenizer, a file is invalid, or the tokenizer cannot have
            `vocab_size` tokens.
    """
    if spec == "char":
        tokenizer = _character_level(texts)
        given_by = "the text has that many different characters"
    elif spec == "bpe":
        tokenizer = _train_bpe(texts, vocab_size or _DEFAULT_VOCAB_SIZE)
        given_by = "more need more text"
    else:
        tokenizer = load_tokenizer(Path(spec))
        given_by = f"{spec} has that many"
    size = tokenizer.get_vocab_size()
    if vocab_size is not None and size != vocab_size:
        raise TrainingError(
            f"vocab_size is {vocab_size:,}, but the tokenizer has {size:,} tokens: {given_by}; "
            f"set it to {size} (--vocab-size), or leave it out"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model folder, or a tokenizer.json.

    Raises:
        TrainingError: there is no tokenizer, or a file is invalid.
    """
    try:
        tokenizer = load_tokenizer_files(path)
    except CheckpointError as error:
        raise TrainingError(str(error)) from None
    if tokenizer is None:
        raise TrainingError(
            f"there is no tokenizer {str(path)!r}: give char, bpe, gpt2, a tokenizer.json, or a "
            "folder with tokenizer.json or with vocab.json and merges.txt"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, source: Path | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json, which the server and transformers load.

    Args:
        source: folder of the tokenizer, if it was loaded from one: its tokenizer_config.json and
            its chat template are copied.

    Raises:
        TrainingError: a file cannot be written; none is ever incomplete.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
    for name in _COPIED_FILES:
        if source is not None and (source / name).is_file():
            files[name] = (source / name).read_bytes()
    for name, data in files.items():
        write_bytes(folder / name, data)


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], separator_id: int | None, description: str
) -> Integer[np.ndarray, " tokens"]:
    """Return the token ids of all texts: uint16 if all ids of the vocabulary fit, else uint32.

    A literal `<|endoftext|>` in a text is encoded as the special token, because collections of
    short texts in one file are separated so.

    Args:
        separator_id: token between two texts; None for none.
        description: of the progress bar.

    Raises:
        TrainingError: the tokenizer cannot encode a character.
    """
    token_ids = array(token_type(tokenizer).char)
    for ids, begins in _encoded(tokenizer, texts, description):
        if begins and token_ids and separator_id is not None:
            token_ids.append(separator_id)
        token_ids.extend(ids)
    return np.frombuffer(token_ids, token_ids.typecode)


def encode_each(tokenizer: Tokenizer, texts: Sequence[str], description: str) -> list[list[int]]:
    """Return the token ids of each text; arguments and errors are those of `encode_texts`."""
    encoded: list[list[int]] = []
    for ids, begins in _encoded(tokenizer, texts, description):
        if begins:
            encoded.append([])
        encoded[-1] += ids
    return encoded


def token_type(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Return the type of token ids: uint16 if all ids of the vocabulary fit, else uint32."""
    fits = max(tokenizer.get_vocab().values(), default=0) < 2**16
    return np.dtype(np.uint16 if fits else np.uint32)


def token_lengths(tokenizer: Tokenizer) -> Integer[np.ndarray, " vocab"]:
    """Return the number of UTF-8 bytes of each token's text; 0 for special tokens."""
    added = tokenizer.get_added_tokens_decoder()
    spelling = find_spelling(tokenizer)
    lengths = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            lengths[token_id] = 0 if added[token_id].special else len(token.encode())
        elif spelling is not None:
            lengths[token_id] = len(spelling.bytes_of(token))
        else:
            lengths[token_id] = len(tokenizer.decode([token_id]).encode())
    return lengths


def _character_level(texts: Iterable[str]) -> Tokenizer:
    characters = sorted(set().union(*texts))
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [spelling.pre_tokenize_str(character)[0][0] for character in characters]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(spelled)}))
    one_character = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([one_character, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE. Pairs that occur once are not merged."""
    if vocab_size < _SMALLEST_BPE:
        raise TrainingError(
            f"vocab_size is {vocab_size} but must be at least {_SMALLEST_BPE} for bpe: the bytes "
            f"and {END_OF_TEXT} (--vocab-size)"
        )
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _bar("Training the tokenizer", texts) as bar:

        def parts() -> Iterator[str]:
            for text in texts:
                for part in pieces(text):
                    for document in part.split(END_OF_TEXT):
                        yield from pieces(document, _MAX_WORD_CHARACTERS)
                    bar.update(len(part))

        tokenizer.train_from_iterator(parts(), trainer)
    return tokenizer


def _encoded(
    tokenizer: Tokenizer, texts: Sequence[str], description: str
) -> Iterator[tuple[list[int], bool]]:
    """Yield the token ids of each part of a text, and whether it is the first of its text."""
    continuation = without_prefix(tokenizer)
    with _bar(description, texts) as bar:
        for batch in _batches(texts):
            first = iter(_encode(tokenizer, [part for part, begins in batch if begins]))
            later = iter(_encode(continuation, [part for part, begins in batch if not begins]))
            for part, begins in batch:
                yield next(first if begins else later).ids, begins
                bar.update(len(part))


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Yield (part of a text, whether it is the first of its text) in lists of similar size."""
    batch: list[tuple[str, bool]] = []
    num_characters = 0
    for text in texts:
        for index, part in enumerate(pieces(text)):
            batch.append((part, index == 0))
            num_characters += len(part)
            if num_characters >= _BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
    yield batch


def _encode(tokenizer: Tokenizer, parts: list[str]) -> list[Any]:
    try:
        return list(tokenizer.encode_batch_fast(parts, add_special_tokens=False))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TrainingError(
            f"the tokenizer cannot encode the text: {_missing(tokenizer, parts) or error}; use "
            "another tokenizer, such as bpe, or change the text"
        ) from error


def _missing(tokenizer: Tokenizer, parts: list[str]) -> str:
    """Return a description of the first character that cannot be encoded; "" if all can."""
    for character in sorted(set().union(*parts)):
        try:
            tokenizer.encode(character, add_special_tokens=False)
        except Exception:  # noqa: BLE001 - the library raises no other class
            return f"its vocabulary lacks {character!r} (U+{ord(character):04X})"
    return ""


def _bar(description: str, texts: Sequence[str]) -> Any:
    total = sum(map(len, texts))
    return progress_bar(
        desc=description, total=total, unit=" chars", unit_scale=True, delay=0.5, leave=False
    )
