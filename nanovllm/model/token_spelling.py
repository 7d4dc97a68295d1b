"""How a vocabulary spells bytes: the bytes that each token adds to a text.

Two spellings give each token bytes of its own, whatever its neighbours are:

- byte-level (Radford et al. 2019, section 2.2): a printable character for each byte. GPT-2, Llama
  3, Qwen, SmolLM2 and Mistral Nemo have it, with different divisions of a text into words.
- SentencePiece's (Kudo and Richardson 2018) with byte tokens: `▁` for a space, `<0x0A>` for a byte
  of a character without a token of its own. Llama 2, TinyLlama and Mistral have it. Encoding
  puts a space before a text, and decoding removes it from the beginning of a text.

Other decoders, such as WordPiece's, put characters between tokens, and have no such bytes.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INVALID_BYTES = re.compile("[\udc80-\udcff]")
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Spelling:
    """A spelling of bytes.

    Attributes:
        space: the characters that stand for a space; None if the spelling is byte-level.
        num_prefix_spaces: how many spaces at the beginning of a text decoding removes, at most.
    """

    space: str | None = None
    num_prefix_spaces: int = 0

    @property
    def is_byte_level(self) -> bool:
        """Whether each character of a token stands for a byte."""
        return self.space is None

    def bytes_of(self, token: str) -> bytes:
        """Return the bytes of a token of the vocabulary."""
        if self.space is None:
            return b"".join(BYTE_OF.get(character, character.encode()) for character in token)
        spaced = token.replace(self.space, " ")
        byte = _BYTE_TOKEN.fullmatch(spaced)
        return bytes.fromhex(byte[1]) if byte else spaced.encode()

    def utf8_decoder(self) -> codecs.IncrementalDecoder:
        """Return a new incremental decoder of UTF-8, which replaces what is invalid by U+FFFD.

        Byte-level, as many U+FFFD as in Python and in the `tokenizers` library; otherwise one for
        each invalid byte, as in SentencePiece. The library also replaces the characters of a run of
        byte tokens before and after an invalid one, which a stream has released already.
        """
        if self.space is None:
            return codecs.getincrementaldecoder("utf-8")("replace")
        return _BytewiseDecoder()

    def decode(self, data: bytes, *, is_whole: bool = True) -> str:
        """Return the text of bytes; `is_whole`: an incomplete character at the end is invalid."""
        if self.space is None:
            return codecs.utf_8_decode(data, "replace", is_whole)[0]
        return _replaced(codecs.utf_8_decode(data, "surrogateescape", is_whole)[0])


class _BytewiseDecoder(codecs.IncrementalDecoder):
    """Python's decoder of UTF-8 with one U+FFFD for each invalid byte."""

    def __init__(self) -> None:
        super().__init__("surrogateescape")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def decode(self, data: bytes, final: bool = False) -> str:  # type: ignore[override]
        return _replaced(self._utf8.decode(data, final))

    def getstate(self) -> tuple[bytes, int]:
        return self._utf8.getstate()


def _replaced(text: str) -> str:
    """Replace the surrogates that stand for invalid bytes."""
    return text if text.isascii() else _INVALID_BYTES.sub(_REPLACEMENT, text)


def strip_prefix(text: str, num_spaces: int) -> tuple[str, int]:
    """Remove the spaces that encoding has put before a text, of which `text` is the beginning.

    Args:
        text: the beginning, which may be empty.
        num_spaces: how many spaces may be removed.

    Returns:
        the rest, and how many spaces may be removed from what follows it.
    """
    rest = text[min(len(text) - len(text.lstrip(" ")), num_spaces) :]
    return rest, 0 if rest else num_spaces - len(text)


def find_spelling(tokenizer: Tokenizer) -> Spelling | None:
    """Return the spelling of a tokenizer's vocabulary; None if its tokens have no bytes."""
    if isinstance(tokenizer.decoder, decoders.ByteLevel):
        return Spelling()
    if not isinstance(tokenizer.decoder, decoders.Sequence):
        return None
    steps = json.loads(tokenizer.decoder.__getstate__())["decoders"]
    match steps:
        case [
            {"type": "Replace", "pattern": {"String": space}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *rest,
        ] if space:
            num_spaces = _prefix_spaces(rest)
            return None if num_spaces is None else Spelling(space, num_spaces)
    return None


def _prefix_spaces(steps: list[dict[str, Any]]) -> int | None:
    """Return how many spaces the last step of a decoder removes; None for other steps."""
    match steps:
        case []:
            return 0
        case [{"type": "Strip", "content": " ", "start": int(start), "stop": 0}]:
            return start
    return None


def _byte_characters() -> Iterator[tuple[str, bytes]]:
    """Yield GPT-2's printable character for each byte.

    Visible Latin-1 characters represent their own byte. The other bytes are represented by U+0100
    and the following characters.
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in visible]
    yield from ((chr(byte), bytes([byte])) for byte in visible)
    yield from ((chr(256 + index), bytes([byte])) for index, byte in enumerate(hidden))


def byte_level_spelling(data: bytes) -> str:
    """Return GPT-2's printable characters for bytes."""
    return "".join(map(_CHARACTER_OF.__getitem__, data))


BYTE_OF = dict(_byte_characters())
"""The byte of each printable character of a byte-level vocabulary."""
_CHARACTER_OF = {byte[0]: character for character, byte in BYTE_OF.items()}
