"""Acceptances: how often drafted tokens were accepted lately, by their source.

Sources are "forced" (tokens that a grammar forces), "after forced" (n-grams after them), "cached"
(text of other requests in the prefix cache), "2-gram" and so on by the length of the n-gram that
occurred before, and "model".
"""

_FIRST_GUESS = 0.6
"""Assumed acceptance before the first drafted token is verified."""
_FIRST_GUESS_FORCED = 0.9
_WEIGHT = 0.05
"""Weight of a drafted token in the running mean."""


class Acceptances:
    """Running means of the probability that a drafted token is accepted if those before it are."""

    def __init__(self, every: "Acceptances | None" = None) -> None:
        """Begin with a guess, or with the means of `every` sequence, which learn from this one."""
        self._means: dict[str, float] = {}
        self._every = every

    def of(self, source: str) -> float:
        """Return the acceptance of a source."""
        if source in self._means:
            return self._means[source]
        if self._every is not None:
            return self._every.of(source)
        return _FIRST_GUESS_FORCED if source == "forced" else _FIRST_GUESS

    def add(self, source: str, num_accepted: int, num_drafted: int) -> None:
        """Add a draft of which the first `num_accepted` tokens were accepted.

        A token after the first that was rejected says nothing, and neither does a draft without
        tokens, or one whose part before it was rejected (`num_accepted` is negative).
        """
        count = min(num_accepted + 1, num_drafted)
        if count > 0:
            mean = self.of(source)
            for index in range(count):
                mean += _WEIGHT * ((index < num_accepted) - mean)
            self._means[source] = mean
            if self._every is not None:
                self._every.add(source, num_accepted, num_drafted)
