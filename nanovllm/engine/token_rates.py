"""The figures of a progress bar: tokens per second of the steps so far."""

from nanovllm.engine.metrics import StepStats


class TokenRates:
    """Prefill and decode tokens per second; a step that did both divides its time by tokens."""

    def __init__(self) -> None:
        self._prompt_tokens = self._decode_tokens = 0
        self._prompt_s = self._decode_s = 0.0

    def add(self, stats: StepStats) -> None:
        """Count a step."""
        if stats.num_tokens:
            self._prompt_tokens += stats.num_prompt_tokens
            self._decode_tokens += stats.num_decode_tokens
            self._prompt_s += stats.duration_s * stats.num_prompt_tokens / stats.num_tokens
            self._decode_s += stats.duration_s * stats.num_decode_tokens / stats.num_tokens

    def __str__(self) -> str:
        prefill = self._prompt_tokens / self._prompt_s if self._prompt_s else 0.0
        decode = self._decode_tokens / self._decode_s if self._decode_s else 0.0
        return f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s"
