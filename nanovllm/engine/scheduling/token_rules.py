"""What a request's settings say about single tokens, laid out once, so that a step has little left to do.

Biases, allowed tokens and penalties hardly change from one token to the next. Laid out in plain arrays of the standard library, they are
joined with those of the other requests by copying memory. Bad words are found by the token that must stand before their last one.
"""

from array import array
from collections.abc import Iterable, Sequence

from nanovllm.sampling_params import SamplingParams

_FORBIDDEN = float("-inf")


class TokenRules:
    """Allowed, biased and forbidden tokens: what the n answers to one prompt share.

    Attributes:
        allowed: ids of 64 bits; None where all tokens are.
        bias_ids, bias_values: what is added to single logits at every step, as 64-bit ids and float32; minus infinity forbids.
    """

    __slots__ = ("_completions", "allowed", "bias_ids", "bias_values")

    def __init__(self, params: SamplingParams, bad_words: Iterable[Sequence[int]]) -> None:
        """Lay out the settings; bad words are spelled in tokens, each at least one."""
        self.allowed = (
            None if params.allowed_token_ids is None else array("q", params.allowed_token_ids)
        )
        biases = dict(params.logit_bias or {})
        self._completions: dict[int, list[tuple[list[int], int]]] = {}
        for word in bad_words:
            *begin, last = word
            if begin:
                self._completions.setdefault(begin[-1], []).append((begin, last))
            else:
                biases[last] = _FORBIDDEN
        self.bias_ids, self.bias_values = array("q", biases.keys()), array("f", biases.values())

    @property
    def has_completions(self) -> bool:
        """Whether there are bad words of more than one token."""
        return bool(self._completions)

    def completions(self, tokens: Sequence[int], num_output_tokens: int) -> list[int]:
        """Tokens that would complete a bad word of more than one token, of which all others are the newest ones of the answer."""
        return [
            last
            for begin, last in self._completions.get(tokens[-1], ())
            if len(begin) <= num_output_tokens and tokens[len(tokens) - len(begin) :] == begin
        ]


class SeenTokens:
    """The distinct tokens of a prompt and its answer, in the order in which they first came.

    Attributes:
        ids: each token once, 64 bits.
        counts: how often the answer has it.
    """

    __slots__ = ("_places", "counts", "ids")

    def __init__(self, prompt_token_ids: Iterable[int] = ()) -> None:
        """The tokens of a prompt, of which the answer has none yet."""
        self._places = {
            token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_token_ids))
        }
        self.ids, self.counts = array("q", self._places), array("q", bytes(8 * len(self._places)))

    def add(self, token_id: int) -> None:
        """Take account of a token of the answer."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.counts.append(0)
        self.counts[place] += 1
