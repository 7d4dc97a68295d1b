"""Tokenizers that training makes: exact, deterministic, and as the server loads them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nanovllm.engine.detokenizer import IncrementalDecoder
from nanovllm.engine.tokenizer import Tokenizer as EngineTokenizer
from nanovllm.errors import InvalidRequestError, TrainingError
from nanovllm.model.tokenizer_files import END_OF_TEXT
from nanovllm.training.data import tokenizer as training_tokenizer
from nanovllm.training.data.text import pieces
from nanovllm.training.data.tokenizer import (
    encode_texts,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    token_lengths,
)
from tests.support.family_tokenizers import llama2

TEXT = "The cat's hat.\r\n\tThe café, 日本 😀\u0301!\n\n  The end\n" * 3
CHARACTERS = sorted(set(TEXT))


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return make_tokenizer("char", [TEXT])


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return make_tokenizer("bpe", [TEXT], 270)


def encode(tokenizer: Tokenizer, *texts: str) -> list[int]:
    separator = tokenizer.token_to_id(END_OF_TEXT)
    return [int(one) for one in encode_texts(tokenizer, texts, separator, "Encoding")]


def test_a_character_is_a_token_in_the_order_of_code_points() -> None:
    tokenizer = make_tokenizer("char", ["hé\n", " 😀h"])
    assert encode(tokenizer, "\n", " é", "😀hh") == [0, 1, 3, 4, 2, 2]
    assert tokenizer.get_vocab_size() == 5
    assert token_lengths(tokenizer).tolist() == [1, 1, 1, 2, 4]


def test_the_server_streams_every_character(char: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(char, tmp_path)
    tokenizer = EngineTokenizer.load(tmp_path)
    decoder = IncrementalDecoder(tokenizer)
    token_ids = tokenizer.encode(TEXT)
    assert token_ids == encode(char, TEXT)
    assert [decoder.push(token_id) for token_id in token_ids] == list(TEXT)
    assert [tokenizer.token_text(token_id) for token_id in token_ids] == list(TEXT)
    assert tokenizer.tokens_around_text == ([], [])


def test_the_bytes_of_sentencepieces_tokens_are_counted() -> None:
    library = llama2().library
    lengths = token_lengths(library)
    names = {"▁the": 4, "▁": 1, "<0x0A>": 1, "é": 2, "</s>": 0}
    assert {name: lengths[library.token_to_id(name)] for name in names} == names
    text = "the world 🙂\nis é"
    ids = library.encode(text, add_special_tokens=False).ids
    assert lengths[ids].sum() == len(text.encode()) + 1, "a space is put before the text"


@given(st.lists(st.sampled_from(["the", " world", " is", "\n", " 🙂", "é"]), max_size=40))
def test_sentencepieces_parts_of_a_text_are_encoded_as_the_whole(words: list[str]) -> None:
    text = "".join(words)
    for scheme in ("always", "first"):
        library = llama2(scheme).library
        parts = list(pieces(text, 16))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_tokenizer, "pieces", lambda _, parts=parts: iter(parts))
            token_ids = encode(library, text)
        assert token_ids == library.encode(text, add_special_tokens=False).ids


def test_the_server_names_the_characters_that_the_vocabulary_lacks(
    char: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(char, tmp_path)
    tokenizer = EngineTokenizer.load(tmp_path)
    for encode_one in (tokenizer.encode, tokenizer.encode_text):
        with pytest.raises(InvalidRequestError, match=r"lacks '1', '\\x00', '\\ud800'; change"):
            encode_one("The 1\0\ud8001")


def test_training_names_the_character_that_a_loaded_vocabulary_lacks(char: Tokenizer) -> None:
    with pytest.raises(TrainingError, match=r"its vocabulary lacks '1' \(U\+0031\)"):
        encode(char, "The 21")


@given(st.text(st.sampled_from(CHARACTERS), max_size=50))
def test_char_decodes_what_it_encodes(char: Tokenizer, text: str) -> None:
    token_ids = encode(char, text)
    assert len(token_ids) == len(text)
    assert char.decode(token_ids) == text


@given(st.text(max_size=50))
def test_bpe_decodes_what_it_encodes(bpe: Tokenizer, text: str) -> None:
    token_ids = encode(bpe, text)
    assert bpe.decode(token_ids) == text
    assert token_lengths(bpe)[token_ids].sum() == len(text.encode())


@given(
    st.lists(
        st.tuples(
            st.text("aT'sé.1", min_size=1, max_size=4),
            st.sampled_from([" ", "  ", "\n", "\n\n", "\n ", " \t"]),
        ),
        max_size=20,
    ),
    st.integers(16, 30),
)
def test_bpe_encodes_the_parts_of_a_text_as_the_whole(
    bpe: Tokenizer, words: list[tuple[str, str]], max_length: int
) -> None:
    text = "".join(word + white_space for word, white_space in words)
    parts = list(pieces(text, max_length))
    token_ids = [token_id for part in parts for token_id in bpe.encode(part).ids]
    assert token_ids == bpe.encode(text).ids


def test_bpe_is_deterministic_and_merges_what_occurs_twice(bpe: Tokenizer) -> None:
    assert make_tokenizer("bpe", [TEXT], 270).to_str() == bpe.to_str()
    assert bpe.get_vocab_size() == 270
    assert bpe.token_to_id(END_OF_TEXT) == 0
    assert "ĠThe" in bpe.get_vocab() or "The" in bpe.get_vocab()


def test_bpe_is_trained_on_words_of_bounded_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of megabytes without a space would take hours."""
    seen: list[str] = []

    def noted(text: str, max_length: int = 65536) -> Iterator[str]:
        for part in pieces(text, max_length):
            seen.append(part)
            yield part
            assert seen[-1] is not part or len(part) <= 4096, "the library got a long word"

    line = "".join(chr(97 + i * i % 26) for i in range(50_000))
    with monkeypatch.context() as patch:
        patch.setattr(training_tokenizer, "pieces", noted)
        make_tokenizer("bpe", [line])
    assert line in seen
    assert "".join(part for part in seen if part != line) == line
    words = TEXT * 200
    trained = make_tokenizer("bpe", [words])
    monkeypatch.setattr(training_tokenizer, "_MAX_WORD_CHARACTERS", len(words))
    assert make_tokenizer("bpe", [words]).to_str() == trained.to_str(), "words are not divided"


def test_end_of_text_separates_texts_and_is_no_text_to_train_on(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    cat, end = encode(bpe, "cat"), bpe.token_to_id(END_OF_TEXT)
    assert encode(bpe, "cat", "cat") == [*cat, end, *cat]
    assert encode(bpe, f"cat{END_OF_TEXT}cat") == [*cat, end, *cat]
    made = make_tokenizer("bpe", [f"ab{END_OF_TEXT}ab{END_OF_TEXT}" * 9])
    assert made.get_vocab_size() == 258, "the bytes, the special token, and ab"
    save_tokenizer(bpe, tmp_path)
    assert EngineTokenizer.load(tmp_path).special_tokens == {END_OF_TEXT: end}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token"] == END_OF_TEXT


def test_the_texts_are_encoded_in_batches(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The cat's hat. ", "é", TEXT] * 4
    whole = encode(bpe, *texts)
    monkeypatch.setattr(training_tokenizer, "_BATCH_CHARACTERS", 20)
    assert encode(bpe, *texts) == whole
    assert encode(bpe) == []


def test_ids_above_65535_take_four_bytes() -> None:
    characters = "".join(map(chr, range(0x10000, 0x10000 + 2**16 + 1)))
    for text, dtype in ((characters[:-1], np.uint16), (characters, np.uint32)):
        tokenizer = make_tokenizer("char", [text])
        tokens = encode_texts(tokenizer, [text[-2:]], None, "Encoding")
        assert tokens.dtype == dtype
        assert tokens.tolist() == [len(text) - 2, len(text) - 1]


@pytest.mark.parametrize(
    ("spec", "vocab_size", "message"),
    [
        ("char", 100, rf"has {len(CHARACTERS)} tokens.*set it to {len(CHARACTERS)}"),
        ("bpe", 5000, r"vocab_size is 5,000, but the tokenizer has \d+ tokens"),
        ("bpe", 256, "at least 257"),
    ],
)
def test_a_vocabulary_larger_than_the_data_allows_is_an_error(
    spec: str, vocab_size: int, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        make_tokenizer(spec, [TEXT], vocab_size)


def test_a_tokenizer_is_loaded_from_a_file_or_a_folder(bpe: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(bpe, tmp_path)
    assert "\n" not in (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert make_tokenizer(str(path), []).to_str() == bpe.to_str()
    bpe.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    token_ids = load_tokenizer(tmp_path).encode(f"The cat{END_OF_TEXT}").ids
    assert token_ids == bpe.encode(f"The cat{END_OF_TEXT}").ids


def test_files_of_the_source_folder_are_kept(char: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tokenizer(char, source)
    (source / "tokenizer_config.json").write_text('{"chat_template": "x"}', encoding="utf-8")
    (source / "chat_template.jinja").write_text("x", encoding="utf-8")
    save_tokenizer(char, tmp_path / "new", source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()
    }


def test_a_missing_or_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("gpt2")):
        with pytest.raises(TrainingError, match="there is no tokenizer"):
            load_tokenizer(path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_tokenizer(tmp_path)
