"""PromptReader: prompts in any form to token ids, with an error for every fault."""

from collections.abc import Iterable, Mapping, Sequence

from nanovllm.engine.request_limits import Limits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError, describe_value, listed
from nanovllm.prompts import Prompt, to_list, to_python_ids
from nanovllm.sampling_params import check_unicode

MAX_TRUNCATED_BYTES = 1 << 18
"""Maximum bytes of a text that is truncated. All of it is tokenized, in 200 times its memory."""
_USUAL_GROWTH = 4
"""Growth of a text in a tokenizer up to which the maximum holds; it is less for others."""
_MAX_BYTES_PER_TOKEN = 16
"""Maximum bytes of a text for each token of a long context; those of models in use have 3 to 5."""
_MAX_CHECKED_CONTEXTS = 16
"""Contexts of token ids that are checked; a longer prompt is refused before."""


class PromptReader:
    """Tokenizes and checks prompts. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, limits: Limits) -> None:
        """Read prompts of a model with `vocab` tokens."""
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._limits = limits
        self._max_token_bytes = tokenizer.max_token_bytes
        growth = max(tokenizer.growth, _USUAL_GROWTH)
        self._max_truncated_bytes = MAX_TRUNCATED_BYTES * _USUAL_GROWTH // growth
        self._max_bytes = max(
            self._max_truncated_bytes, _MAX_BYTES_PER_TOKEN * limits.max_model_len
        )

    def read(
        self, prompt: Prompt, *, add_special_tokens: bool = True, kept: slice | None = None
    ) -> tuple[str | None, list[int]]:
        """Return a prompt's text (None for a prompt of token ids) and its token ids.

        Args:
            prompt: text or token ids, in any form of `Prompt`.
            add_special_tokens: add the tokens that the tokenizer puts around every text.
            kept: slice of the tokens to keep, for truncation; None for all of them. As in
                transformers, the tokens around a text are kept too, and count.

        Raises:
            InvalidRequestError: the prompt is invalid.
        """
        text, whole = self._read_whole(prompt, add_special_tokens, is_truncated=kept is not None)
        has_around = add_special_tokens and text is not None
        around = self._tokenizer.tokens_around_text if has_around else ([], [])
        token_ids = whole if kept is None else _truncated(whole, kept, *map(len, around))
        if text is None or len(token_ids) == len(whole):
            return text, token_ids
        return self._tokenizer.decode(token_ids), token_ids

    def _read_whole(
        self, prompt: Prompt, add_special_tokens: bool, *, is_truncated: bool
    ) -> tuple[str | None, list[int]]:
        content: object = prompt
        if isinstance(prompt, Mapping):
            if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
                names = ", ".join(describe_value(name) for name in list(prompt)[:5]) or "neither"
                raise InvalidRequestError(
                    f"a prompt has either 'prompt' or 'prompt_token_ids', not {names}",
                    param="prompt",
                )
            [(name, content)] = prompt.items()
            if isinstance(content, str) is not (name == "prompt"):
                expected = "text" if name == "prompt" else "a list of token ids"
                raise InvalidRequestError(
                    f"'{name}' is {describe_value(content)} but must be {expected}", param="prompt"
                )
        if isinstance(content, str):
            return content, self._encode(content, add_special_tokens, is_truncated=is_truncated)
        content = to_list(content)
        if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray | memoryview):
            raise InvalidRequestError(
                f"the prompt is {describe_value(content)} but must be text or a list of token ids",
                param="prompt",
            )
        if not content:
            raise InvalidRequestError(
                "the prompt is empty; give at least one token", param="prompt"
            )
        # Refuse millions of token ids without checking each of them.
        if not is_truncated and len(content) > _MAX_CHECKED_CONTEXTS * self._limits.max_model_len:
            self._limits.check_prompt_length(len(content))
        token_ids = to_python_ids(content)
        wrong = [item for item in token_ids if not isinstance(item, int) or isinstance(item, bool)]
        if wrong:
            is_list = isinstance(wrong[0], str | Mapping | Sequence)
            remedy = "; give one prompt, not a list of prompts" if is_list else ""
            raise InvalidRequestError(
                f"the prompt has {describe_value(wrong[0])} among its token ids, which must be "
                f"integers{remedy}",
                param="prompt",
            )
        self.check_ids("prompt", token_ids)
        return None, token_ids

    def _encode(self, text: str, add_special_tokens: bool, *, is_truncated: bool) -> list[int]:
        self.check_text(text, is_truncated=is_truncated)
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidRequestError(
                "the prompt has no tokens once encoded; give other text", param="prompt"
            )
        self.check_ids("prompt", token_ids)
        return token_ids

    def check_text(self, text: str, *, is_truncated: bool = False) -> None:
        """Check a text before it is encoded; raises InvalidRequestError."""
        if not text:
            raise InvalidRequestError(
                "the prompt is empty; give at least one character", param="prompt"
            )
        check_unicode("prompt", text)
        num_bytes = len(text.encode())
        at_least = num_bytes // self._max_token_bytes if self._max_token_bytes else 1
        if at_least > self._limits.max_model_len and not is_truncated:
            raise ContextLengthError(
                f"the prompt has at least {at_least} tokens, the limit is "
                f"{self._limits.max_model_len}; shorten it",
                param="prompt",
            )
        limit = self._max_truncated_bytes if is_truncated else self._max_bytes
        if num_bytes > limit:
            kind = "one that is to be truncated" if is_truncated else "this model's tokenizer"
            raise InvalidRequestError(
                f"the prompt has {num_bytes} bytes, the limit for {kind} is {limit}; "
                "send the part to be read",
                param="prompt",
            )

    def check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        """Raise InvalidRequestError for ids outside the vocabulary; `name` is their field."""
        outside = [i for i in token_ids if not 0 <= i < self._vocab]
        if outside:
            raise InvalidRequestError(
                f"{name} has token ids outside the vocabulary of 0 to {self._vocab - 1}: "
                f"{listed(str(i)[:24] for i in outside)}",
                param=name,
            )


def _truncated(token_ids: list[int], kept: slice, num_before: int, num_after: int) -> list[int]:
    """Return the tokens in `kept`, the first or the last of them, and those around a text."""
    whole = range(len(token_ids))
    count, end = len(whole[kept]), len(token_ids) - num_after
    room = count - num_before - num_after
    if room < 0 or count == len(token_ids):
        return token_ids[kept]
    start = num_before if kept.start is None else end - room
    return token_ids[:num_before] + token_ids[start : start + room] + token_ids[end:]
