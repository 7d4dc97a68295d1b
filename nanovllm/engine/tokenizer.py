"""Tokenizer: encode text to token ids and decode them, with the `tokenizers` library.

nanovllm/model/tokenizer_files.py reads the files. Text from users never becomes a special token: a
literal `<|endoftext|>` is encoded as ordinary characters, unless the caller sets `allow_special`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Encoding, models
from tokenizers import Tokenizer as LibraryTokenizer

from nanovllm.errors import CheckpointError, InvalidRequestError, printable
from nanovllm.model.token_spelling import (
    BYTE_OF,
    byte_level_spelling,
    find_spelling,
    strip_prefix,
)
from nanovllm.model.tokenizer_files import (
    load_tokenizer_files,
    missing_tokenizer,
    without_prefix,
)
from nanovllm.model.tokenizer_growth import text_growth

_SAMPLE = "Hello, world 1"


@dataclass(frozen=True, slots=True)
class ControlToken:
    """An added token, and whether it removes the white space to its left and right."""

    token_id: int
    strips_left: bool
    strips_right: bool


class Tokenizer:
    """One model's tokenizer. Its methods may be called from any thread."""

    def __init__(self, library: LibraryTokenizer) -> None:
        """Take ownership of a tokenizer of the library."""
        library.no_truncation()
        library.no_padding()
        self._plain = library
        # In the library's terms: encode the names of special tokens as plain text.
        self._plain.encode_special_tokens = True
        self._with_special = LibraryTokenizer.from_str(library.to_str())
        self._with_special.encode_special_tokens = False
        added = library.get_added_tokens_decoder()
        self.special_token_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.control_tokens = {
            token.content: ControlToken(token_id, token.lstrip, token.rstrip)
            for token_id, token in added.items()
            if not _is_white_space(token)
        }
        self.spelling = find_spelling(library)
        self.is_byte_level = self.spelling is not None and self.spelling.is_byte_level
        self._is_character_level = self.is_byte_level and isinstance(
            library.model, models.WordLevel
        )
        self._bytes_of: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load the tokenizer of a model folder.

        Raises CheckpointError if a file is missing or invalid.
        """
        library = load_tokenizer_files(folder)
        if library is None:
            files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            raise CheckpointError(missing_tokenizer(str(folder), files))
        try:
            tokenizer = cls(library)
            tokenizer.decode(tokenizer.encode(tokenizer.sample))
        except (KeyboardInterrupt, SystemExit):
            raise
        except InvalidRequestError as error:
            raise CheckpointError(
                f"the tokenizer in {folder} cannot encode text: {error.__cause__}"
            ) from None
        except BaseException as error:  # noqa: BLE001 - the library panics with a BaseException
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from None
        return tokenizer

    @property
    def vocab(self) -> int:
        """Number of tokens, including special tokens."""
        return self._plain.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of each token by its text in the tokenizer's own spelling."""
        return self._plain.get_vocab(with_added_tokens=True)

    def as_json(self) -> str:
        """Return the tokenizer in the format of tokenizer.json."""
        return str(self._plain.to_str())

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name, such as `<|endoftext|>`."""
        return {self._added[token_id]: token_id for token_id in self.special_token_ids}

    @property
    def max_token_bytes(self) -> int | None:
        """Maximum number of bytes of text in one token.

        None if there is no maximum, because a normalizer may remove text, or because an unknown
        character sequence of any length may become one token.
        """
        vocab = self._plain.get_vocab(with_added_tokens=True)
        if (
            not self.is_byte_level
            or self._plain.normalizer is not None
            or not vocab.keys() >= BYTE_OF.keys()
        ):
            return None
        return max(*map(len, vocab), *(len(content.encode()) for content in self._added.values()))

    @property
    def growth(self) -> int:
        """How many times as many bytes a text may have when it is divided into tokens."""
        return text_growth(self._plain)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]:
        """Return the token ids of `text`.

        Args:
            add_special_tokens: add the tokens that the tokenizer puts around every text, if any.
                GPT-2 has none.
            allow_special: encode names such as `<|endoftext|>` in the text as special tokens.

        Raises:
            InvalidRequestError: the tokenizer cannot encode the text.
        """
        library = self._with_special if allow_special else self._plain
        return list(self._encode(library, text, add_special_tokens=add_special_tokens).ids)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the token ids of a text in the middle of another, with no tokens around it.

        Unlike in a text of its own, SentencePiece's tokenizers put no space before it. Raises
        InvalidRequestError if the tokenizer cannot encode the text.
        """
        return list(self._encode(self._continuation, text, add_special_tokens=False).ids)

    @cached_property
    def _continuation(self) -> LibraryTokenizer:
        library = without_prefix(self._plain)
        library.encode_special_tokens = True
        return library

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of `text`, and the index of the character after each token.

        Names such as `<|endoftext|>` in the text are special tokens, and no others are added.
        Raises InvalidRequestError if the tokenizer cannot encode the text.
        """
        encoding = self._encode(self._with_special, text, add_special_tokens=False)
        return list(encoding.ids), [end for _, end in encoding.offsets]

    def _encode(
        self, library: LibraryTokenizer, text: str, *, add_special_tokens: bool
    ) -> Encoding:
        try:
            # Unlike `encode`, `encode_batch` releases the GIL.
            (encoding,) = library.encode_batch([text], add_special_tokens=add_special_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            reason = self._missing_characters(text) or printable(str(error)[:200])
            raise InvalidRequestError(
                f"the model's tokenizer cannot encode this text: {reason}; change the text",
                param="prompt",
            ) from error
        return encoding

    def _missing_characters(self, text: str) -> str:
        """Return what a character-level vocabulary lacks; "" for other tokenizers."""
        if not self._is_character_level:
            return ""
        missing = [
            repr(character)
            for character in dict.fromkeys(text)
            if self._plain.token_to_id(
                byte_level_spelling(character.encode("utf-8", "surrogatepass"))
            )
            is None
        ]
        return f"the vocabulary lacks {', '.join(missing[:5])}" if missing else ""

    @cached_property
    def sample(self) -> str:
        """A text that can be encoded; a character-level vocabulary may lack digits."""
        try:
            self.encode(_SAMPLE)
        except InvalidRequestError:
            token_ids = self._plain.get_vocab(with_added_tokens=False).values()
            return self.decode([min(token_ids, default=0)])
        return _SAMPLE

    @cached_property
    def tokens_around_text(self) -> tuple[list[int], list[int]]:
        """Ids of the special tokens added before and after a text; GPT-2 has none."""
        encoding = self._encode(self._plain, self.sample, add_special_tokens=True)
        is_text = [not is_special for is_special in encoding.special_tokens_mask]
        if True not in is_text:
            return encoding.ids, []
        begin, end = is_text.index(True), len(is_text) - is_text[::-1].index(True)
        return encoding.ids[:begin], encoding.ids[end:]

    def encode_text(self, text: str, *, is_first: bool = True) -> list[int]:
        """Return the token ids of a text, none of which is a control token.

        `is_first`: no control token comes before the text. SentencePiece's tokenizers may put a
        space before such a text only.

        Raises InvalidRequestError if the tokenizer cannot encode the text so.
        """
        library, renumbered = self._without_control if is_first else self._after_control
        encoding = self._encode(library, text, add_special_tokens=False)
        token_ids = [renumbered.get(token_id, token_id) for token_id in encoding.ids]
        if not self._control_ids.isdisjoint(token_ids):
            raise InvalidRequestError(
                "the text contains the name of a special token, which this tokenizer cannot encode "
                "as text; leave it out"
            )
        return token_ids

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(token.token_id for token in self.control_tokens.values())

    @cached_property
    def _without_control(self) -> tuple[LibraryTokenizer, dict[int, int]]:
        """The tokenizer without control tokens, and {its id: our id} of the other added tokens."""
        described = json.loads(self.as_json())
        described["added_tokens"] = [
            token
            for token in described["added_tokens"]
            if token["content"] not in self.control_tokens
        ]
        described["post_processor"] = None
        library = LibraryTokenizer.from_str(json.dumps(described))
        ours = {content: token_id for token_id, content in self._added.items()}
        added = library.get_added_tokens_decoder()
        return library, {token_id: ours[token.content] for token_id, token in added.items()}

    @cached_property
    def _after_control(self) -> tuple[LibraryTokenizer, dict[int, int]]:
        """The same for a text after a control token."""
        library, renumbered = self._without_control
        return without_prefix(library, {"first"}), renumbered

    def decode(
        self,
        token_ids: Iterable[int],
        *,
        skip_special_tokens: bool = True,
        follows_text: bool = False,
    ) -> str:
        """Return the text of `token_ids`. Bytes of incomplete characters become U+FFFD.

        `follows_text`: the text continues another one, so that it keeps a space at its beginning,
        which SentencePiece's tokenizers put before every text.
        """
        kept = [i for i in token_ids if not (skip_special_tokens and i in self.special_token_ids)]
        if self.spelling is None:
            return str(self._plain.decode(kept, skip_special_tokens=False))
        text = self.spelling.decode(b"".join(map(self.token_bytes, kept)))
        return text if follows_text else strip_prefix(text, self.spelling.num_prefix_spaces)[0]

    def has_text(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> bool:
        """Return whether one of the tokens adds text; the last ones are looked at first."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset[int]()
        return any(i not in skipped and self.token_name(i) for i in reversed(token_ids))

    def token_text(self, token_id: int) -> str:
        """Return a token's text; U+FFFD for a part of a character, "" for an unknown id."""
        if self.spelling is None:
            return str(self._plain.decode([token_id], skip_special_tokens=False))
        return self.spelling.decode(self.token_bytes(token_id))

    def token_name(self, token_id: int) -> str:
        """Return a token as spelled in the vocabulary, such as `Ġthe`; "" for an unknown id."""
        return self._plain.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; b"" for an unknown id.

        Without a spelling of bytes they are those of the token's text alone.
        """
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        if self.spelling is None:
            return self.token_text(token_id).encode()
        if self.is_byte_level and token_id in self._added:
            return self._added[token_id].encode()
        return self.spelling.bytes_of(self.token_name(token_id))


def _is_white_space(token: AddedToken) -> bool:
    """Return whether an added token is white space, such as indentation, and counts as text."""
    return not token.special and str(token.content).isspace()
