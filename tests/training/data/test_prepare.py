"""From text or a token file to two datasets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.config import TrainingConfig
from nanovllm.training.data.prepare import PreparedData, load_tokens, prepare_data
from nanovllm.training.data.tokenizer import make_tokenizer, save_tokenizer


def prepare(
    *data: Path,
    tokenizer: str,
    context: int = 3,
    end_of_text_id: int | None = None,
    **settings: Any,
) -> PreparedData:
    config = TrainingConfig(data=data, output="run", **settings)
    return prepare_data(config, tokenizer=tokenizer, context=context, end_of_text_id=end_of_text_id)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """Return a tokenizer of the tokens a, b, é."""
    save_tokenizer(make_tokenizer("char", ["abé"]), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_text_becomes_two_datasets(tmp_path: Path) -> None:
    """The validation text has characters of its own, and its length is in bytes."""
    (tmp_path / "1.txt").write_text("abcabcab", encoding="utf-8")
    (tmp_path / "2.txt").write_text("cé", encoding="utf-8")
    data = prepare(tmp_path, tokenizer="char", validation_fraction=0.3)
    assert data.train.tokens.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert data.validation.tokens.tolist() == [1, 2, 3]
    assert data.validation_bytes == 4
    assert data.end_of_text_id is None
    assert [file.name for file in data.files] == ["1.txt", "2.txt"]
    assert data.train.context == data.validation.context == 3


def test_documents_are_separated_and_bpe_learns_from_the_training_text(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text("abab " * 8, encoding="utf-8")
    (tmp_path / "2.txt").write_text("xyxyxyxyx", encoding="utf-8")
    data = prepare(tmp_path, tokenizer="bpe", validation_fraction=0.15)
    vocabulary = data.tokenizer.get_vocab()
    assert "ab" in vocabulary
    assert "xy" not in vocabulary
    tokens = data.train.tokens.tolist()
    assert tokens.count(data.end_of_text_id) == 1
    assert data.tokenizer.decode(tokens) == "abab " * 8 + "x"
    other = prepare(tmp_path, tokenizer="bpe", validation_fraction=0.15, end_of_text_id=7)
    assert other.end_of_text_id == 7
    assert other.train.tokens.tolist().count(7) == 1


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_a_token_file_becomes_two_datasets(
    tmp_path: Path, tokenizer_folder: Path, suffix: str
) -> None:
    tokens = np.array([0, 1, 0, 1, 0, 1, 0, 1, 2, 1], np.uint16)
    path = tmp_path / f"tokens{suffix}"
    if suffix == ".npy":
        np.save(path, tokens.astype(np.int64))
    else:
        path.write_bytes(tokens.astype("<u2").tobytes())
    data = prepare(path, tokenizer=str(tokenizer_folder), validation_fraction=0.2)
    assert data.train.tokens.tolist() == tokens[:8].tolist()
    assert data.validation.tokens.tolist() == [2, 1]
    assert data.validation_bytes == len("éb".encode())
    assert data.files == (path,)
    assert data.train.batch(0, 2, 0).inputs.shape == (2, 3)


@pytest.mark.parametrize(
    ("tokens", "spec", "message"),
    [
        ([0, 1, 3, 0, 1], "", "has token 3, but the tokenizer .* has tokens 0 to 2"),
        ([0, -1, 0, 0, 0], "", "has token -1"),
        ([0, 1, 0, 1], "", "the training text has 3 tokens, but a context of 3 needs at least 4"),
        ([0, 1, 0, 1, 1], "", "validation text has 1 token, but needs at least 2"),
        ([0, 1, 0], "char", "no char tokenizer can be made"),
        ([0.5], "", "is float64"),
        ([[1]], "", "must be one dimension of integers"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, tokens: list[int], spec: str, message: str
) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.array(tokens))
    with pytest.raises(TrainingError, match=message):
        prepare(path, tokenizer=spec or str(tokenizer_folder))


def test_a_damaged_token_file_is_an_error(tmp_path: Path) -> None:
    for name, data, message in (
        ("a.npy", b"text", "is not a token file"),
        ("a.bin", b"abc", "odd number of bytes"),
        ("b.bin", b"", "is not a token file"),
        ("b.npy", b"", "is not a token file"),
        ("pickle.npy", b"\x80\x04N.", "is not a token file: it has no header"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TrainingError, match=message):
            load_tokens(tmp_path / name)
    with (tmp_path / "zip.npy").open("wb") as file:
        np.savez(file, a=np.arange(3))
    with pytest.raises(TrainingError, match="an archive"):
        load_tokens(tmp_path / "zip.npy")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_tokens(tmp_path / "missing.npy")


def test_text_shorter_than_the_context_and_mixed_data_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 2, encoding="utf-8")
    assert len(prepare(path, tokenizer="char", context=17).train.tokens) == 18
    with pytest.raises(TrainingError, match="has 18 tokens, but a context of 18 needs at least 19"):
        prepare(path, tokenizer="char", context=18)
    with pytest.raises(TrainingError, match="one token file"):
        prepare(tmp_path / "a.npy", path, tokenizer="char")


def test_validation_data_replaces_the_end_of_the_training_text(tmp_path: Path) -> None:
    """Its files are left out of the training text, however they are named."""
    (tmp_path / "1.txt").write_text("abcabc", encoding="utf-8")
    held_out = tmp_path / "2.txt"
    held_out.write_text("é\n", encoding="utf-8")
    same = tmp_path / ".." / tmp_path.name / "2.txt"
    data = prepare(tmp_path, validation_data=[same], tokenizer="char")
    assert data.tokenizer.decode(data.train.tokens.tolist()) == "abcabc"
    assert data.tokenizer.decode(data.validation.tokens.tolist()) == "é\n"
    assert data.validation_bytes == 3
    assert [file.name for file in data.files] == ["1.txt", "2.txt"]
    assert "1 of 2 files are validation data and left out" in data.warnings[0]
    assert "the validation text has 2 tokens" in data.warnings[1]
    with pytest.raises(TrainingError, match="all other training text is validation data"):
        prepare(tmp_path, validation_data=[tmp_path], tokenizer="char")
    with pytest.raises(TrainingError, match="does not exist"):
        prepare(held_out, validation_data=[tmp_path / "3"], tokenizer="char")


def test_validation_data_may_be_a_second_token_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    train, validation = tmp_path / "train.npy", tmp_path / "validation.npy"
    np.save(train, np.array([0, 1] * 3))
    np.save(validation, np.array([2, 1]))
    data = prepare(train, validation_data=[validation], tokenizer=str(tokenizer_folder))
    assert (len(data.train.tokens), data.validation.tokens.tolist()) == (6, [2, 1])
    assert (data.validation_bytes, data.files) == (3, (train, validation))
    for other, message in ((train, "is training and validation data"), (tmp_path, "or text files")):
        with pytest.raises(TrainingError, match=message):
            prepare(train, validation_data=[other], tokenizer="char")
