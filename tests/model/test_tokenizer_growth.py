"""Tokenizers that multiply texts are refused when they are loaded."""

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from nanovllm.errors import CheckpointError
from nanovllm.model.tokenizer_files import load_tokenizer_files
from nanovllm.model.tokenizer_growth import MAX_STEPS, check_growth, text_growth
from tests.support.family_tokenizers import FAMILIES

REPLACE = normalizers.Replace("a", "a" * 1000)
BYTES = pre_tokenizers.ByteLevel(use_regex=False)


def table(*texts: bytes) -> str:
    """A table of SentencePiece: an empty trie, and texts."""
    return base64.b64encode((0).to_bytes(4, "little") + b"\0".join(texts)).decode()


def tokenizer(
    normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, post: Any = None
) -> Tokenizer:
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, [], unk_token="a"))
    for name, part in (
        ("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder),
        ("post_processor", post),
    ):  # fmt: skip
        if part is not None:
            setattr(made, name, part)
    return made


HOSTILE = {
    "replacements": tokenizer(normalizers.Sequence([REPLACE] * 3)),
    "very many replacements": tokenizer(normalizers.Sequence([REPLACE] * 60)),
    "one replacement": tokenizer(REPLACE),
    "nested replacements": tokenizer(
        normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", "aa")] * 4)] * 2)
    ),
    "an empty pattern": tokenizer(normalizers.Replace(Regex("x*"), "y" * 80)),
    "prefixes": tokenizer(normalizers.Sequence([normalizers.Prepend("aaaa")] * 4)),
    "bytes of bytes": tokenizer(pre_tokenizer=pre_tokenizers.Sequence([BYTES] * 8)),
    "both parts": tokenizer(
        normalizers.Replace("a", "a" * 40), pre_tokenizers.Sequence([BYTES] * 2)
    ),
    "too many steps": tokenizer(normalizers.Sequence([normalizers.NFC()] * (MAX_STEPS + 1))),
    "the decoder": tokenizer(decoder=decoders.Sequence([decoders.Replace("a", "a" * 100)] * 3)),
    "the post-processor": tokenizer(post=processors.TemplateProcessing(single=["$A"] * 100)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_that_multiplies_texts_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(HOSTILE[name].to_str(), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"(long|steps), the limit"):
        load_tokenizer_files(path)


def test_a_post_processor_that_adds_many_tokens_is_refused(tmp_path: Path) -> None:
    """A file of 200 KB would make 10^8 tokens of an empty text."""
    described = json.loads(tokenizer().to_str())

    def load(count: int) -> Tokenizer | None:
        added = [{"SpecialToken": {"id": "a", "type_id": 0}}] * count
        described["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*added, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"a": {"id": "a", "ids": [0] * count, "tokens": ["a"] * count}},
        }
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(described), encoding="utf-8")
        return load_tokenizer_files(path)

    with pytest.raises(CheckpointError, match="adds 1000000 tokens to a text, the limit is 1024"):
        load(1000)
    usual = load(2)
    assert usual is not None
    assert len(usual.encode("b").ids) == 5


USUAL = {
    "GPT-2": (tokenizer(None, pre_tokenizers.ByteLevel()), 3),
    "Llama": (
        tokenizer(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        12,
    ),
    "ALBERT": (
        tokenizer(
            normalizers.Sequence(
                [
                    normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(),
                    normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " "),
                ]
            ),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        ),
        8,
    ),
    "BERT": (tokenizer(normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_tokenizers_in_use_are_accepted_with_their_growth(name: str) -> None:
    made, growth = USUAL[name]
    check_growth(made)
    assert text_growth(made) == growth
    for text in ("a b  c", "a" * 50, "  ", "é中\u0130``"):
        normalized = made.normalizer.normalize_str(text) if made.normalizer else text
        pieces = (
            [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str(normalized)]
            if made.pre_tokenizer
            else [normalized]
        )
        assert len("".join(pieces).encode()) <= 11 * growth * len(text.encode())


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizers_of_the_families_are_accepted_with_their_growth(name: str) -> None:
    made = FAMILIES[name]().library
    check_growth(made)
    growth = text_growth(made)

    @given(st.text("a \n\u2581", min_size=1, max_size=8) | st.text(min_size=1))
    def check(text: str) -> None:
        text = unicodedata.normalize("NFC", text)
        normalized = made.normalizer.normalize_str(text) if made.normalizer else text
        pieces = [normalized]
        if made.pre_tokenizer:
            pieces = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str(normalized)]
        assert len("".join(pieces).encode()) <= growth * len(text.encode())

    check()


def test_one_table_of_characters_may_be_unicodes() -> None:
    described = json.loads(tokenizer().to_str())

    def growth(*tables: str) -> int:
        steps = [{"type": "Precompiled", "precompiled_charsmap": one} for one in tables]
        described["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return text_growth(Tokenizer.from_str(json.dumps(described)))

    assert growth(table(b"a", b"b" * 33)) == 1
    assert growth(table(b"a", b"b" * 100)) == 100
    assert growth(table(b"a" * 10), table(b"a" * 20)) == 200
