"""Compare log-probabilities, greedy tokens and tokenization with transformers, for `verify`.

The reference runs in float32 with eager attention. Greedy tokens must be equal up to the first step
where its top two tokens are closer than twice the tolerance: from there on either token is right,
and the texts may diverge.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanovllm.cli.argument_types import read_lines
from nanovllm.cli.verify_reference import Reference
from nanovllm.config import EngineConfig
from nanovllm.errors import EngineFaultError
from nanovllm.llm import LLM
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.logprobs import log_softmax
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

_CHUNK_ROWS = 32  # positions whose log-probabilities, [rows, vocab], are compared at once
_PASSAGE = (
    "Part {}. It was the best of times, it was the worst of times, it was the age of wisdom, it "
    "was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it "
    "was the season of Light, it was the season of Darkness.\n\n"
)
_PROMPTS = {
    "word": "Hello",
    "story": "Once upon a time there was a little girl who lived with her grandmother at the edge "
    "of a deep forest.",
    "question": "Q: Why is the sky blue, and why isn't it violet?\nA:",
    "unicode": "Füße, naïve café \u2013 “東京の天気”, "
    "Привет, мир! مرحبا, שלום, "
    "🙂👩\u200d👩\u200d👧 ½ … \ufb01n",
    "numbers": "3.14159, 2,718,281, 1e-10, 0xFF, 2024-02-29, 50%, $19.99, (1 + 2) * 3 = 9, "
    "1000000000000",
    "code": 'def fib(n: int) -> int:\n    """The n-th Fibonacci number."""\n    return n '
    "if n < 2 else fib(n - 1) + fib(n - 2)\n\nprint(fib(10))",
    "spaces": "  two  spaces,\ta tab,\n\n\n   three new lines,\r\n and some at the end   ",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its token ids, of which the first `kept` leave room for the output."""

    name: str
    text: str
    token_ids: list[int]
    kept: int

    @property
    def kept_ids(self) -> list[int]:
        """Return the token ids that are compared."""
        return self.token_ids[: self.kept]


@dataclass(frozen=True, slots=True)
class Bound:
    """Tolerances against the float32 reference.

    Attributes:
        tolerance: maximum difference of log-probabilities; with a `divergence`, of the prompt's
            own tokens only.
        divergence: maximum mean Kullback-Leibler divergence of a prompt, in nats per token, or
            None. Rounded weights change improbable tokens much and the distribution little.
        close: gap between the reference's top two tokens below which either is right.
    """

    tolerance: float
    divergence: float | None
    close: float

    @classmethod
    def of(cls, config: EngineConfig, tolerance: float | None) -> "Bound":
        """Return the bound for --tolerance, or else for the types of weights and cache."""
        if tolerance is not None:
            return cls(tolerance, None, 2 * tolerance)
        rounded = {"int8", "bfloat16"} & {config.quantization, config.kv_cache_dtype, config.dtype}
        if not rounded:
            return cls(1e-4, None, 2e-4)
        return cls(1.0, 5e-3, 0.5) if "int8" in rounded else cls(0.25, 5e-4, 0.1)

    def __str__(self) -> str:
        if self.divergence is None:
            return f"log-probabilities within {self.tolerance:g}"
        return (
            f"mean KL divergence within {self.divergence:g}, "
            f"log-probabilities of the prompt within {self.tolerance:g}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result for one prompt.

    Attributes:
        tokens: compared tokens of the `tokens_of_prompt`.
        is_tokenized_alike: None if transformers has no tokenizer for the folder.
        logprob_difference: maximum over all positions and the whole vocabulary; None if not finite.
        target_difference: maximum over the prompt's own tokens (`prompt_logprobs`); None if not
            finite.
        greedy_equal: equal tokens before the first different one.
        first_close_step: first step, from 0, at which the reference's top two tokens are closer
            than `Bound.close`, or None.
        gap_where_different: gap of its top two tokens at the first different token, or None.
        divergence: mean Kullback-Leibler divergence from the reference, in nats per token; None if
            not finite.
    """

    prompt: str
    tokens: int
    tokens_of_prompt: int
    is_tokenized_alike: bool | None
    logprob_difference: float | None
    target_difference: float | None
    greedy_tokens: int
    greedy_equal: int
    first_close_step: int | None
    gap_where_different: float | None
    divergence: float | None = None

    def agrees(self, bound: Bound) -> bool:
        """Return whether all differences are within a bound."""
        everywhere = (
            (self.logprob_difference, bound.tolerance)
            if bound.divergence is None
            else (self.divergence, bound.divergence)
        )
        limits = ((self.target_difference, bound.tolerance), everywhere)
        within = [value is not None and value <= limit for value, limit in limits]
        return all(within) and self.is_greedy_right and self.is_tokenized_alike is not False

    @property
    def is_greedy_right(self) -> bool:
        """Return whether all tokens before the first close step are equal."""
        must = self.greedy_tokens if self.first_close_step is None else self.first_close_step
        return self.greedy_equal >= must


def read_prompts(llm: LLM, path: Path | None, max_tokens: int) -> list[Prompt]:
    """Return the lines of a file, or the built-in texts and one as long as the context.

    Prompts are truncated to leave room for `max_tokens`. Raises ValueError if there is no room, or
    no text that the tokenizer knows.
    """
    room = llm.engine.max_model_len - max_tokens
    if room < 1:
        raise ValueError(
            f"--max-tokens is {max_tokens}, which leaves no room for a prompt in a context of "
            f"{llm.engine.max_model_len}; lower it"
        )
    if path is None:
        texts = {**_PROMPTS, "long": _long_text(llm, room)}
    else:
        texts = {f"line {number}": line.rstrip("\r") for number, line in read_lines(path)}
    encoded = {name: llm.tokenizer.encode(text, allow_special=True) for name, text in texts.items()}
    prompts = [
        Prompt(name, texts[name], ids, min(len(ids), room)) for name, ids in encoded.items() if ids
    ]
    if not prompts:
        raise ValueError(
            f"{path or 'the built-in set'} has no prompt that the model's tokenizer knows; "
            "give others with --prompts"
        )
    return prompts


def compare(
    llm: LLM, reference: Reference, prompts: list[Prompt], *, max_tokens: int, close: float
) -> list[Comparison]:
    """Run all prompts in one batch and compare each with the reference.

    `close` is the gap between the reference's top two tokens below which either is right. The
    engine cannot be used afterwards: its cache is overwritten.
    """
    params = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, prompt_logprobs=0
    )
    outputs = llm.generate([{"prompt_token_ids": prompt.kept_ids} for prompt in prompts], params)
    for output in outputs:
        if output.error is not None:
            raise EngineFaultError(output.error)
    pairs = tqdm(
        list(zip(prompts, outputs, strict=True)), desc="Compared", unit="prompt", disable=None
    )
    return [_compare_one(llm, reference, prompt, output, close) for prompt, output in pairs]


def _compare_one(
    llm: LLM, reference: Reference, prompt: Prompt, output: RequestOutput, close: float
) -> Comparison:
    next_ids = np.asarray(prompt.kept_ids[1:], dtype=np.int64)
    differences, target_differences, divergences = [], [], []
    reported = _reported_logprobs(output)
    start = 0
    for ours, theirs in zip(
        _our_logprobs(llm, prompt.kept_ids),
        reference.logprobs(prompt.kept_ids, _CHUNK_ROWS),
        strict=True,
    ):
        differences.append(np.abs(ours - theirs).max())
        divergences.append((np.exp(theirs) * (theirs - ours)).sum(axis=1))
        targets = next_ids[start : start + len(theirs)]
        of_targets = theirs[np.arange(len(targets)), targets]
        ours_of_targets = reported[start : start + len(theirs)]
        target_differences.append(np.abs(ours_of_targets - of_targets).max(initial=0.0))
        start += len(theirs)
    tokens = output.outputs[0].token_ids
    reference_tokens, gaps = reference.greedy(prompt.kept_ids, len(tokens))
    is_equal = [ours == theirs for ours, theirs in zip(tokens, reference_tokens, strict=True)]
    num_equal = [*is_equal, False].index(False)
    reference_ids = reference.encode(prompt.text)
    return Comparison(
        prompt=prompt.name,
        tokens=prompt.kept,
        tokens_of_prompt=len(prompt.token_ids),
        is_tokenized_alike=None if reference_ids is None else reference_ids == prompt.token_ids,
        logprob_difference=_largest(differences),
        target_difference=_largest(target_differences),
        greedy_tokens=len(tokens),
        greedy_equal=num_equal,
        first_close_step=next((step for step, gap in enumerate(gaps) if gap < close), None),
        gap_where_different=gaps[num_equal] if num_equal < len(tokens) else None,
        divergence=_largest([np.concatenate(divergences).mean()]),
    )


def _our_logprobs(llm: LLM, token_ids: list[int]) -> Iterator[np.ndarray]:
    """Yield log-probabilities after every token, float32 [rows, vocab], by chunked prefill."""
    engine, backend = llm.engine, llm.engine.runner.backend
    block_table = np.arange(-(-len(token_ids) // engine.config.block_size), dtype=np.int64)[None]
    hidden = []
    chunk_size = engine.config.max_num_batched_tokens
    for start in range(0, len(token_ids), chunk_size):
        chunk = token_ids[start : start + chunk_size]
        batch = ForwardBatch.single(chunk, start=start, all_rows=True)
        # Block i of the table is block i, so that slots are positions.
        hidden.append(backend.forward(replace(batch, block_tables=block_table)).copy())
    rows = np.concatenate(hidden)
    for start in range(0, len(rows), _CHUNK_ROWS):
        yield log_softmax(backend.logits(rows[start : start + _CHUNK_ROWS]))


def _reported_logprobs(output: RequestOutput) -> np.ndarray:
    """Return the `prompt_logprobs` of the prompt's tokens but the first."""
    logprobs = [
        position[token_id].logprob
        for token_id, position in zip(
            output.prompt_token_ids, output.prompt_logprobs or [], strict=True
        )
        if position
    ]
    assert len(logprobs) == len(output.prompt_token_ids) - 1
    return np.asarray(logprobs, dtype=np.float64)


def _largest(differences: Sequence[float]) -> float | None:
    """Return the maximum; None if it is not finite, which JSON cannot express."""
    largest = float(np.max(differences))
    return largest if np.isfinite(largest) else None


def _long_text(llm: LLM, tokens: int) -> str:
    """Return a text of at least about `tokens` tokens; empty if the tokenizer knows none of it."""
    tokens_a_part = len(llm.tokenizer.encode(_PASSAGE.format(1)))
    parts = tokens // tokens_a_part + 1 if tokens_a_part else 0
    return "".join(_PASSAGE.format(part + 1) for part in range(parts))
