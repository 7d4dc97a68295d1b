"""Encoding equals GPT-2's, decoding restores the text, and damaged tokenizers are reported."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError
from nanovllm.hub import BUNDLED_MODEL, resolve_model
from tests.support.checkpoints import END_OF_TEXT, write_tokenizer
from tests.support.tokenizers import word_piece

GPT2_SUBSET = Path(__file__).parent.parent / "data" / "gpt2_subset"
EXPECTED: list[dict[str, Any]] = json.loads(
    (GPT2_SUBSET / "expected.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load(GPT2_SUBSET)


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.load(resolve_model(BUNDLED_MODEL))


@pytest.mark.parametrize("entry", EXPECTED, ids=lambda entry: repr(entry["text"]))
def test_texts_are_split_as_gpt2_splits_them(gpt2: Tokenizer, entry: dict[str, Any]) -> None:
    assert gpt2.encode(entry["text"]) == entry["ids"]
    assert gpt2.decode(entry["ids"]) == entry["text"]


@pytest.mark.skipif(
    "GPT2_TOKENIZER_DIR" not in os.environ,
    reason="GPT2_TOKENIZER_DIR does not name a folder with GPT-2's vocab.json and merges.txt",
)
def test_the_whole_tokenizer_of_gpt2_gives_the_recorded_ids() -> None:
    whole = Tokenizer.load(Path(os.environ["GPT2_TOKENIZER_DIR"]))
    assert whole.vocab == 50257
    assert whole.special_token_ids == {50256}
    assert whole.max_token_bytes == 128
    for entry in EXPECTED:
        assert whole.encode(entry["text"]) == entry["ids"]
        assert whole.decode(entry["ids"]) == entry["text"]


def test_the_best_known_example() -> None:
    assert EXPECTED[0] == {
        "text": "Hello world, I am GPT-2",
        "ids": [15496, 995, 11, 314, 716, 402, 11571, 12, 17],
    }


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_both_forms_of_tokenizer_file_say_the_same(tmp_path: Path, form: str) -> None:
    names = write_tokenizer(tmp_path, form)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab == len(names)
    assert tokenizer.special_token_ids == {names.index(END_OF_TEXT)}
    assert tokenizer.encode("the ill") == [
        names.index("the"),
        names.index("Ġ"),
        names.index("i"),
        names.index("ll"),
    ]
    assert tokenizer.is_byte_level


def test_a_run_of_spaces_leaves_its_last_one_to_the_word(gpt2: Tokenizer) -> None:
    space, b = gpt2.encode(" ")[0], gpt2.encode(" b")
    assert len(b) == 1
    assert gpt2.encode("a   b")[1:] == [space, space, *b]  # the pattern's \s+(?!\S)
    assert gpt2.encode("a   ")[1:] == [space] * 3


def test_a_special_token_in_the_text_is_text(gpt2: Tokenizer, bundled: Tokenizer) -> None:
    for tokenizer in (gpt2, bundled):
        (end,) = tokenizer.special_token_ids
        text = f"one{END_OF_TEXT} two {END_OF_TEXT}"
        plain = tokenizer.encode(text)
        assert end not in plain
        assert tokenizer.decode(plain) == text
        special = tokenizer.encode(text, allow_special=True)
        assert special.count(end) == 2
        assert tokenizer.decode(special, skip_special_tokens=False) == text
        assert tokenizer.decode(special) == "one two "
        assert tokenizer.encode(text) == plain, "allow_special of one call changed the next"


def test_an_added_token_that_is_not_special_is_found_in_text_and_kept_in_it(tmp_path: Path) -> None:
    names = write_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("[élan]", special=False, normalized=False)])
    tokenizer = Tokenizer(library)
    assert tokenizer.encode("[élan]") == [len(names)]
    assert tokenizer.decode([len(names)]) == "[élan]"
    assert tokenizer.token_text(len(names)) == "[élan]"


@pytest.fixture(scope="module")
def limits(bundled: Tokenizer, gpt2: Tokenizer) -> list[tuple[Tokenizer, int]]:
    """Tokenizers with their max_token_bytes, which takes milliseconds to compute."""
    return [(tokenizer, tokenizer.max_token_bytes or 0) for tokenizer in (bundled, gpt2)]


@given(text=st.text())
@example(text=END_OF_TEXT)
@example(text="\ufffd\x00\r\n\u0085\u2028 \U0010ffff")
@example(text=" " * 70 + "\n" * 70)
def test_decoding_gives_the_encoded_text_back(
    limits: list[tuple[Tokenizer, int]], text: str
) -> None:
    for tokenizer, max_token_bytes in limits:
        token_ids = tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == text
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
        lengths = [len(tokenizer.token_bytes(token_id)) for token_id in token_ids]
        assert max(lengths, default=0) <= max_token_bytes


def test_half_a_character_decodes_to_the_replacement_character(gpt2: Tokenizer) -> None:
    first, *rest = gpt2.encode("🙂")
    assert rest
    assert gpt2.decode([first]) == gpt2.token_text(first) == "\ufffd"
    assert gpt2.decode([first, *rest]) == "🙂"


def test_an_id_without_a_token_has_no_text(gpt2: Tokenizer) -> None:
    assert gpt2.decode([15496, 49999, 10**9]) == "Hello"
    assert gpt2.token_text(10**9) == ""


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("xyzxyz")) == 6


def test_special_tokens_that_the_file_puts_around_a_text_may_be_left_out(tmp_path: Path) -> None:
    end = write_tokenizer(tmp_path).index(END_OF_TEXT)
    plain = Tokenizer.load(tmp_path).encode("xyz")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("xyz") == [end, *plain]
    assert tokenizer.encode("xyz", add_special_tokens=False) == plain
    assert tokenizer.encode(END_OF_TEXT)[1:] == tokenizer.encode(
        END_OF_TEXT, add_special_tokens=False
    ), "in the text it is text"


def test_other_kinds_of_tokenizer_decode_by_the_library() -> None:
    tokenizer = word_piece()
    assert not tokenizer.is_byte_level
    assert tokenizer.max_token_bytes is None, "an unknown word of any length is one token"
    assert tokenizer.decode(tokenizer.encode("playing games")) == "playing games"
    assert len(tokenizer.encode("q" * 5000)) == 1


def test_the_longest_token_is_unknown_where_bytes_or_a_normaliser_may_drop_text(
    tmp_path: Path,
) -> None:
    write_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(library).max_token_bytes == len(END_OF_TEXT)
    library.normalizer = tokenizers.normalizers.Strip()
    assert Tokenizer(library).max_token_bytes is None
    partial = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    partial.decoder = tokenizers.decoders.ByteLevel()
    assert Tokenizer(partial).max_token_bytes is None


def test_a_folder_without_tokenizer_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path, "vocab.json")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, or vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b"{",
        b'{"model": 3}',
        b"\xff\xfe\x00",
        b'{"version": "1.0", "model": {"type": "?"}}',
    ],
)
def test_a_damaged_tokenizer_json_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_truncated_tokenizer_json_is_a_checkpoint_error(tmp_path: Path, cut: float) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": "b"}'),
        ("merges.txt", "a\n"),
        ("merges.txt", "never seen\n"),
    ],
)
def test_damaged_vocab_and_merges_are_a_checkpoint_error(
    tmp_path: Path, file: str, content: str
) -> None:
    write_tokenizer(tmp_path, "vocab.json")
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_panic_of_the_library_is_the_requests_fault(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised as no Exception, and would pass by all that answers errors."""

    class PanicError(BaseException):
        pass

    class Broken:
        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> None:
            raise PanicError("index out of bounds\x1b[31m")

    tokenizer = Tokenizer.load(tiny_model)
    monkeypatch.setattr(tokenizer, "_plain", Broken())
    with pytest.raises(
        InvalidRequestError, match=r"cannot encode this text: index out of bounds\\x1b"
    ):
        tokenizer.encode("a")


def test_a_tokenizer_that_cannot_encode_is_told_when_it_is_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The library panics at every text if the post-processor names an unknown token."""
    described = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[NOPE]", "type_id": 0}}, first],
        "pair": [first, second],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer.load(tmp_path)
