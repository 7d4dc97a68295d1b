"""Sampling settings of a request that concern single tokens, packed once for all of its steps.

Logit biases and allowed tokens are constant, and counts for penalties change by one token per step.
They are stored in `array.array`, which a step concatenates with those of other requests by copying
memory. Bad words are indexed by their second-to-last token.
"""

from array import array
from collections.abc import Iterable, Sequence

from nanovllm.sampling_params import SamplingParams

_BANNED = float("-inf")


class TokenRules:
    """Allowed, biased and banned tokens, shared by all choices of a prompt.

    Attributes:
        allowed: int64 ids of the allowed tokens; None for all.
        bias_ids, bias_values: int64 ids and float32 values that are added to logits at every step;
            minus infinity bans a token.
    """

    __slots__ = ("_bad_words", "allowed", "bias_ids", "bias_values")

    def __init__(self, params: SamplingParams, bad_words: Iterable[Sequence[int]]) -> None:
        """Pack the settings. `bad_words` are token ids, at least one per bad word."""
        self.allowed = (
            None if params.allowed_token_ids is None else array("q", params.allowed_token_ids)
        )
        biases = dict(params.logit_bias or {})
        self._bad_words: dict[int, list[tuple[list[int], int]]] = {}
        for bad_word in bad_words:
            *prefix, last = bad_word
            if prefix:
                self._bad_words.setdefault(prefix[-1], []).append((prefix, last))
            else:
                biases[last] = _BANNED
        self.bias_ids, self.bias_values = array("q", biases.keys()), array("f", biases.values())

    @property
    def has_bad_sequences(self) -> bool:
        """Whether there are bad words of more than one token."""
        return bool(self._bad_words)

    def banned_next_tokens(self, tokens: Sequence[int], num_output_tokens: int) -> list[int]:
        """Return the tokens that would complete a bad word of more than one token.

        Only the output counts, which is the last `num_output_tokens` of `tokens`.
        """
        return [
            last
            for prefix, last in self._bad_words.get(tokens[-1], ())
            if len(prefix) <= num_output_tokens and tokens[len(tokens) - len(prefix) :] == prefix
        ]


class SeenTokens:
    """The distinct tokens of a prompt and its output, in order of first occurrence.

    Attributes:
        ids: int64 ids, each token once.
        counts: int64 occurrences of each token in the output.
    """

    __slots__ = ("_indices", "counts", "ids")

    def __init__(self, prompt_token_ids: Iterable[int] = ()) -> None:
        """Start with the tokens of a prompt, and an empty output."""
        self._indices = {
            token_id: index for index, token_id in enumerate(dict.fromkeys(prompt_token_ids))
        }
        self.ids, self.counts = array("q", self._indices), array("q", bytes(8 * len(self._indices)))

    def copy(self) -> "SeenTokens":
        """Return a copy, to which tokens may be added."""
        other = SeenTokens()
        other._indices = dict(self._indices)
        other.ids, other.counts = self.ids[:], self.counts[:]
        return other

    def add(self, token_id: int) -> None:
        """Count a token of the output."""
        index = self._indices.setdefault(token_id, len(self.ids))
        if index == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0)
        self.counts[index] += 1
