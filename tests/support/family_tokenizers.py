"""Small tokenizers with the pipelines of the families' published tokenizer.json files.

Each has a few hundred tokens: its special tokens, all bytes, and what merges spell. The normalizer,
the division into words, the post-processor and the decoder are those of the family.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as LibraryTokenizer

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.token_spelling import byte_level_spelling
from tests.support.checkpoints import write_json

WORDS = (
    " the", "Hello", " Hello", " world", "ing", " is", "user", "assistant", "system", "\n\n",
    "tool", "name", "00", "2026", "    ", "'s", "é", "è", "世", "界", "🙂", "\u0301", "INST", "arg",
)  # fmt: skip
WHOLE_WORDS = (" reachable", "by-no-merge")
"""Tokens that only ignore_merges finds."""
_NO_PREFIX = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}"
_QWEN_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}"
_NEMO_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Family:
    """A tokenizer and its tokenizer_config.json."""

    library: LibraryTokenizer
    settings: Mapping[str, Any]

    def write(self, folder: Path) -> Path:
        """Write both files into a folder, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.library.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", self.settings)
        return folder

    @property
    def tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer, without the settings."""
        return Tokenizer(LibraryTokenizer.from_str(self.library.to_str()))


def _add_word(vocab: dict[str, int], merges: list[tuple[str, str]], word: str) -> None:
    """Add a token, and the merges that spell it from the left."""
    token = word[0]
    for character in word[1:]:
        if (token, character) not in merges:
            merges.append((token, character))
        token += character
        vocab.setdefault(token, len(vocab))


def _sentence_piece(scheme: str) -> LibraryTokenizer:
    vocab = {name: i for i, name in enumerate(("<unk>", "<s>", "</s>"))}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    spelled = [word.replace(" ", "▁") for word in WORDS if word not in {"世", "🙂", "\n\n"}]
    for character in sorted(set("".join(spelled)) | set("▁[]/<>:.,{}\"'") | {"é"}):
        vocab.setdefault(character, len(vocab))
    for word in spelled:
        _add_word(vocab, merges, word)
    library = LibraryTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "always":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        library.normalizer = normalizers.Sequence(spaces)
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return library


def _byte_level(words: pre_tokenizers.PreTokenizer | None, **options: Any) -> LibraryTokenizer:
    """Return byte-level BPE, which divides texts by `words`; None for GPT-2's words and digits."""
    vocab = {name: i for i, name in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _add_word(vocab, merges, byte_level_spelling(word.encode()))
    for word in WHOLE_WORDS:
        vocab.setdefault(byte_level_spelling(word.encode()), len(vocab))
    library = LibraryTokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            words or pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _add(library: LibraryTokenizer, names: Iterable[str], *, special: bool = True) -> None:
    tokens = [AddedToken(name, special=special, **_NO_PREFIX) for name in names]
    if special:
        library.add_special_tokens(tokens)
    else:
        library.add_tokens(tokens)


def _put_before(library: LibraryTokenizer, name: str) -> processors.PostProcessor:
    token_id = library.token_to_id(name)
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B:1", special_tokens=[(name, token_id)]
    )


def _token(content: str) -> dict[str, Any]:
    """Return a special token as an object, as older settings have it."""
    return {"__type": "AddedToken", "content": content, **_NO_PREFIX}


def llama2(scheme: str = "always") -> Family:
    """Llama 2, TinyLlama and Mistral 0.1: SentencePiece's with byte tokens; `<s>` before a text.

    `scheme` "first" is that of newer files, which put a space before the first text only.
    """
    library = _sentence_piece(scheme)
    _add(library, ("<unk>", "<s>", "</s>"))
    library.post_processor = _put_before(library, "<s>")
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": _token("<s>"),
        "eos_token": _token("</s>"), "unk_token": _token("<unk>"), "pad_token": None,
        "legacy": False, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return Family(library, settings)


def mistral() -> Family:
    """Mistral 0.3: a space before the first text only, and control tokens of the template."""
    family = llama2("first")
    names = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    _add(family.library, (*names, "[TOOL_RESULTS]", "[/TOOL_RESULTS]"))
    strings = {f"{name}_token": text for name, text in (("bos", "<s>"), ("eos", "</s>"))}
    return Family(family.library, {**family.settings, **strings})


def llama3() -> Family:
    """Llama 3: words of GPT-4 without merges for whole words; 256 special tokens; bos."""
    library = _byte_level(_split(_LLAMA3_WORDS), ignore_merges=True)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    names += [f"<|reserved_special_token_{number}|>" for number in range(256 - len(names))]
    _add(library, names)
    library.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _put_before(library, "<|begin_of_text|>")]
    )
    settings = {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return Family(library, settings)


def qwen() -> Family:
    """Qwen 2, 2.5 and 3: Unicode's form NFC, single digits, no bos, tokens that are not special."""
    library = _byte_level(_split(_QWEN_WORDS))
    library.normalizer = normalizers.NFC()
    _add(library, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    texts = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>")
    _add(library, (*texts, "</think>"), special=False)
    library.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return Family(library, settings)


def smollm2() -> Family:
    """SmolLM2: GPT-2's words with single digits, no bos; ChatML's tokens are its bos and eos."""
    library = _byte_level(None)
    _add(library, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    settings = {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return Family(library, settings)


def nemo() -> Family:
    """Mistral Nemo: byte-level, words that end before a capital letter, `<s>` before a text."""
    library = _byte_level(_split(_NEMO_WORDS), ignore_merges=True)
    _add(library, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"))
    library.post_processor = _put_before(library, "<s>")
    settings = {
        "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return Family(library, settings)


FAMILIES: Mapping[str, Callable[[], Family]] = {
    "llama2": llama2,
    "llama2-first": lambda: llama2("first"),
    "mistral": mistral,
    "llama3": llama3,
    "qwen": qwen,
    "smollm2": smollm2,
    "nemo": nemo,
}
SENTENCE_PIECE = ("llama2", "llama2-first", "mistral")
BYTE_LEVEL = ("llama3", "qwen", "smollm2", "nemo")

TEXTS: Sequence[str] = (
    "Hello", "Hello world", " Hello", "the  world\n\n is", "Hello's 2026 and 1234567",
    "naïve é e\u0301 世界 🙂🙂!", "    four\tspaces ", "\n", "by-no-merge reachable",
    "XMLHttp/Path//\n camelCase", "a\u0000\x7f\u2028▁b", "<s>Hello</s> <|im_start|>",
    "<|begin_of_text|>the", "{\"name\": [1, 2.5]}",
)  # fmt: skip
