"""Tokenizers of the families: token ids and texts of transformers, bytes, and streamed text."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.engine.detokenizer import IncrementalDecoder, StopStrings
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError
from tests.support.checkpoints import write_json, write_tokenizer
from tests.support.family_tokenizers import BYTE_LEVEL, FAMILIES, SENTENCE_PIECE, TEXTS, WHOLE_WORDS
from tests.support.processing import make_input_processor, submit

RECORDED: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "reference" / "recorded_tokenizers.json").read_text("utf-8")
)["texts"]
TOKENIZERS = {name: make().tokenizer for name, make in FAMILIES.items()}
LIBRARIES = {name: make().library for name, make in FAMILIES.items()}
NAMES = st.sampled_from(sorted(TOKENIZERS))
SCRIPT = st.text(st.sampled_from("the wordlé\u0301世界🙂\n▁<0x>1' "), max_size=24) | st.text(
    max_size=8
)


def bytes_in_pieces(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return one token of the vocabulary per byte."""
    ids = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab))}
    if not tokenizer.is_byte_level:
        vocabulary = tokenizer.vocabulary
        ids |= {bytes([byte]): vocabulary[f"<0x{byte:02X}>"] for byte in range(256)}
    return [ids[bytes([byte])] for byte in data]


def streamed(tokenizer: Tokenizer, token_ids: list[int], **options: bool) -> list[str]:
    """Return the text that each token releases, and the rest; what is peeked is released."""
    decoder = IncrementalDecoder(tokenizer, **options)
    pieces = []
    for token_id in token_ids:
        peeked = decoder.peek(token_id)
        pieces.append(decoder.push(token_id))
        assert peeked == pieces[-1]
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(FAMILIES[name]().write(tmp_path))
    for text, expected in zip(TEXTS, RECORDED[name], strict=True):
        ids = tokenizer.encode(text)
        assert ids == expected["ids"], text
        assert tokenizer.encode(text, add_special_tokens=False) == ids[expected["num_around"] :]
        special = tokenizer.encode(text, allow_special=True)
        assert special == expected["special_ids"], text
        assert tokenizer.decode(ids) == expected["text"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected["special_text"]


def test_one_bos_comes_before_a_text_where_the_family_has_it() -> None:
    before = {
        name: [tokenizer.token_name(i) for i in tokenizer.tokens_around_text[0]]
        for name, tokenizer in TOKENIZERS.items()
    }
    assert before == {
        "llama2": ["<s>"], "llama2-first": ["<s>"], "mistral": ["<s>"], "nemo": ["<s>"],
        "llama3": ["<|begin_of_text|>"], "qwen": [], "smollm2": [],
    }  # fmt: skip
    assert all(tokenizer.tokens_around_text[1] == [] for tokenizer in TOKENIZERS.values())


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("llama2", {}, ["<s>"]),
        ("llama2", {"add_bos_token": True}, ["<s>"]),
        ("llama2", {"add_bos_token": False}, []),
        ("llama2", {"add_eos_token": True}, ["</s>"]),
        ("llama2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "</s>"]),
        ("llama3", {"add_bos_token": None}, []),
        ("qwen", {"add_bos_token": True, "bos_token": None}, []),
        ("qwen", {"add_bos_token": True, "bos_token": "<|endoftext|>"}, ["<|endoftext|>"]),
        ("smollm2", {"add_bos_token": True}, ["<|im_start|>"]),
    ],
)
def test_the_settings_decide_on_the_tokens_around_a_text(
    tmp_path: Path, name: str, settings: dict[str, Any], expected: list[str]
) -> None:
    family = FAMILIES[name]()
    family.write(tmp_path)
    kept = {key: value for key, value in family.settings.items() if not key.startswith("add_")}
    write_json(tmp_path / "tokenizer_config.json", {**kept, **settings})
    tokenizer = Tokenizer.load(tmp_path)
    before, after = tokenizer.tokens_around_text
    assert [tokenizer.token_name(i) for i in [*before, *after]] == expected
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [*before, *plain, *after]


def test_a_token_around_texts_that_the_vocabulary_lacks_is_reported(tmp_path: Path) -> None:
    FAMILIES["qwen"]().write(tmp_path)
    settings = {"add_bos_token": True, "bos_token": {"content": "<nope>"}}
    write_json(tmp_path / "tokenizer_config.json", settings)
    with pytest.raises(CheckpointError, match="puts '<nope>' around every text, which the vocab"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_a_tokenizer_in_another_form_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(CheckpointError, match=f"no tokenizer.json, only {name}, .*save_pretrained"):
        Tokenizer.load(tmp_path)


def test_words_of_qwen_are_not_divided_as_gpt2s(tmp_path: Path) -> None:
    """Its slow tokenizer is saved without tokenizer.json, which alone has the division."""
    write_tokenizer(tmp_path, "vocab.json")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(CheckpointError, match=r"Qwen's division.*needs tokenizer\.json"):
        Tokenizer.load(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert Tokenizer.load(tmp_path).is_byte_level


def test_the_bytes_of_tokens_are_what_they_add_to_a_text() -> None:
    tokenizer = TOKENIZERS["llama2"]
    expected = {
        "▁the": b" the", "▁▁": b"  ", "<0x0A>": b"\n", "<0xE4>": b"\xe4", "é": "é".encode(),
        "</s>": b"</s>", "'s": b"'s",
    }  # fmt: skip
    for name, data in expected.items():
        token_id = tokenizer.vocabulary[name]
        assert tokenizer.token_bytes(token_id) == data
        assert tokenizer.token_text(token_id) == data.decode(errors="replace")
    assert tokenizer.token_bytes(10**6) == b""


@given(name=NAMES, text=SCRIPT)
@example(name="llama2", text="  two spaces")
@example(name="mistral", text="▁")
@example(name="qwen", text="e\u0301\u2126")
def test_the_bytes_of_a_texts_tokens_join_to_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    data = b"".join(map(tokenizer.token_bytes, ids))
    whole = tokenizer.decode(ids)
    assert data.decode() == tokenizer.decode(ids, follows_text=True)
    assert whole == LIBRARIES[name].decode(ids), "the library decodes valid texts alike"
    if name in SENTENCE_PIECE:
        is_kept = "▁" not in text and not text.startswith(" ")
    else:
        is_kept = name != "qwen"  # which normalizes
    assert whole == text or not is_kept


@given(
    name=NAMES,
    token_ids=st.lists(st.integers(0, 700), max_size=24),  # the last ones have no token
    skip=st.booleans(),
    follows_text=st.booleans(),
)
@example(name="llama2", token_ids=[298, 298, 1, 298], skip=True, follows_text=False)
def test_streamed_pieces_join_to_the_whole_text(
    name: str, token_ids: list[int], skip: bool, follows_text: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    pieces = streamed(tokenizer, token_ids, skip_special_tokens=skip, follows_text=follows_text)
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip, follows_text=follows_text)
    assert "".join(pieces) == whole
    if not follows_text and "\ufffd" not in whole:
        assert whole == LIBRARIES[name].decode(
            [i for i in token_ids if not skip or i not in tokenizer.special_token_ids],
            skip_special_tokens=False,
        )


@given(
    name=NAMES,
    data=st.lists(
        st.sampled_from(["🙂", "世", "é", "a", " "]).map(str.encode) | st.binary(max_size=2),
        max_size=6,
    ).map(b"".join),
)
@example(name="mistral", data="世".encode() + b"\xff" + b"a")
def test_characters_come_with_their_last_byte(name: str, data: bytes) -> None:
    tokenizer = TOKENIZERS[name]
    ids = bytes_in_pieces(tokenizer, data)
    pieces = streamed(tokenizer, ids, follows_text=True)
    for count in range(len(data) + 1):
        released, known = "".join(pieces[:count]), data[:count].decode(errors="ignore")
        assert released.replace("\ufffd", "") == known.replace("\ufffd", ""), "a character is late"
    errors = "surrogateescape" if name in SENTENCE_PIECE else "replace"
    text = data.decode(errors=errors)
    expected = "".join("\ufffd" if "\udc80" <= one <= "\udcff" else one for one in text)
    assert "".join(pieces) == expected


@pytest.mark.parametrize("name", SENTENCE_PIECE)
def test_each_invalid_byte_is_replaced_as_in_the_library(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for data in (b"\xff", b"\xe4\xb8", b"\xf0\x9f\x99", b"\xc3\xc3", b"\x80\x80"):
        ids = [*bytes_in_pieces(tokenizer, data), tokenizer.vocabulary["a"]]
        expected = LIBRARIES[name].decode(ids)
        assert tokenizer.decode(ids) == expected == "\ufffd" * len(data) + "a"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_continuation_keeps_the_space_at_its_beginning(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer.encode("Hello")
    output = tokenizer.encode("Hello world")[len(prompt) :]
    assert tokenizer.has_text(prompt)
    assert streamed(tokenizer, output, follows_text=True) == [" world", ""]
    assert tokenizer.decode(output, follows_text=True) == " world"
    bos = tokenizer.tokens_around_text[0]
    assert not tokenizer.has_text(bos), "after bos alone the text begins"
    assert tokenizer.has_text(bos, skip_special_tokens=False) is bool(bos)
    at_start = streamed(tokenizer, tokenizer.encode("the", add_special_tokens=False))
    assert "".join(at_start) == "the"


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_strings_are_found_across_byte_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    decoder, stops = (
        IncrementalDecoder(tokenizer, follows_text=True),
        StopStrings(["🙂!", "\n\nthe"]),
    )
    released, found = "", None
    for token_id in bytes_in_pieces(tokenizer, "a🙂?世🙂! more".encode()):
        text, found = stops.push(decoder.push(token_id))
        released += text
        if found:
            break
    assert (released, found) == ("a🙂?世", "🙂!")


def test_whole_words_are_tokens_where_merges_are_ignored() -> None:
    for name in ("llama3", "nemo"):
        tokenizer = TOKENIZERS[name]
        found = [tokenizer.encode(word, add_special_tokens=False) for word in WHOLE_WORDS[:1]]
        assert [len(ids) for ids in found] == [1]
    assert len(TOKENIZERS["qwen"].encode(WHOLE_WORDS[0])) > 1


def test_special_tokens_are_left_out_and_others_kept() -> None:
    qwen = TOKENIZERS["qwen"]
    call, end = qwen.vocabulary["<tool_call>"], qwen.vocabulary["<|im_end|>"]
    assert {call, end} <= {token.token_id for token in qwen.control_tokens.values()}
    assert qwen.decode([call, end]) == "<tool_call>"
    assert streamed(qwen, [call, end]) == ["<tool_call>", "", ""]
    llama = TOKENIZERS["llama3"]
    assert len(llama.special_tokens) == 256
    assert llama.decode(list(llama.special_tokens.values())) == ""


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_the_first_text_of_a_chat_is_like_all_others_of_byte_level(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.encode_text("the", is_first=False) == tokenizer.encode_text("the")


def test_the_prefix_space_of_later_texts_is_that_of_the_library() -> None:
    for name in SENTENCE_PIECE:
        tokenizer = TOKENIZERS[name]
        parts = ["the", "Hello", " world"]
        whole = tokenizer.encode("</s>".join(parts), allow_special=True, add_special_tokens=False)
        (end,) = (tokenizer.special_tokens["</s>"],)
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += [end] * (index > 0) + tokenizer.encode_text(part, is_first=index == 0)
        assert ids == whole, name


@given(name=NAMES, first=SCRIPT, second=SCRIPT)
@example(name="llama2", first="", second="▁")  # a space at the start, with nothing before it
def test_a_continuation_has_no_space_before_it(name: str, first: str, second: str) -> None:
    tokenizer = TOKENIZERS[name]
    joined = tokenizer.encode(first, add_special_tokens=False)
    joined += tokenizer.encode_continuation(second)
    expected = tokenizer.decode(tokenizer.encode(first)) + tokenizer.decode(
        tokenizer.encode_continuation(second), follows_text=bool(first)
    )
    assert tokenizer.decode(joined) == expected
    text = unicodedata.normalize("NFC", second) if name == "qwen" else second
    if name in SENTENCE_PIECE:
        text = text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode_continuation(second), follows_text=True) == text


def test_bad_words_are_banned_within_and_at_the_beginning_of_words() -> None:
    for name in SENTENCE_PIECE:
        tokenizer = TOKENIZERS[name]
        processor = make_input_processor(tokenizer)
        (request,) = submit(processor, "Hello", bad_words=["the", " world"]).requests
        banned = [[tokenizer.token_name(i) for i in ids] for ids in request.bad_words]
        assert banned == [["t", "h", "e"], ["▁the"], ["▁world"]]


def test_a_special_token_cannot_be_forged_by_encode_text() -> None:
    for name, tokenizer in TOKENIZERS.items():
        for text in ("<s>", "</s>x", "<unk>", "<|im_end|>", "<tool_call>", "[INST]", "<0x0A>"):
            try:
                ids = tokenizer.encode_text(text)
            except InvalidRequestError:
                pytest.fail(f"{name} cannot encode {text}")
            assert tokenizer.decode(ids) == text
