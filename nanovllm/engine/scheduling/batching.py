"""Convert a step's plan to flat arrays for the runner, and the runner's output to updates.

The runner and the model get only arrays and frozen dataclasses, never a Request.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import accumulate
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np

from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import PlannedSequence, SequenceUpdate, StepPlan
from nanovllm.engine.scheduling.token_rules import SeenTokens
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.sampling import ROW_SETTINGS, SamplingSettings, TokenLists, TokenLogprobs
from nanovllm.runner.logit_rows import NO_PROMPT_ROWS, LogitRows, PromptRows
from nanovllm.runner.native_model_runner import RunnerOutput

D = TypeVar("D", bound=np.generic)
Mask: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.bool_]]"
"""Whether each token of the vocabulary is allowed next, [vocab]."""
Int64s: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"

_SEED_MASK = 2**64 - 1


class SampledRow(NamedTuple):
    """A row that gets a token, which follows the tokens of a request and `drafted`."""

    request: Request
    drafted: tuple[int, ...] = ()

    @property
    def seen(self) -> SeenTokens:
        """The distinct tokens before the row's token, and their counts; empty without penalties."""
        seen = self.request.seen
        if self.drafted and self.request.sampling.has_penalties:
            seen = seen.copy()
            for token_id in self.drafted:
                seen.add(token_id)
        return seen


def build(plan: StepPlan, block_size: int) -> tuple[ForwardBatch, LogitRows, SamplingSettings]:
    """Return the plan as arrays: the batch, the use of its logit rows, and sampling settings.

    The logit rows of a sequence are its prompt log-probability rows, its hidden rows and its
    sampled rows, in this order. A fork computes no tokens; it samples from its source's last row.
    """
    computed = [sequence for sequence in plan.sequences if sequence.count > 0]
    starts = [0, *accumulate(sequence.count for sequence in computed)]
    logit_rows, rows, sampled = _rows(plan.sequences, starts)
    parts = [(each.token_ids, each.start, each.request.block_ids) for each in computed]
    return forward_batch(parts, logit_rows, block_size), rows, sampling_settings(sampled)


def forward_batch(
    parts: Sequence[tuple[Sequence[int], int, list[int]]], logit_rows: list[int], block_size: int
) -> ForwardBatch:
    """Return a batch without padding, except that shorter block tables are padded with 0.

    A part is a sequence: the tokens to compute, the position of the first, and its blocks.
    """
    positions: list[int] = []
    slots: list[int] = []
    for token_ids, start, blocks in parts:
        end = start + len(token_ids)
        positions += range(start, end)
        slots += [
            blocks[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        ]
    max_blocks = max(len(blocks) for _, _, blocks in parts)
    return ForwardBatch(
        token_ids=_int64([token_id for token_ids, _, _ in parts for token_id in token_ids]),
        positions=_int64(positions),
        query_starts=_int64([0, *accumulate(len(token_ids) for token_ids, _, _ in parts)]),
        context_lens=_int64([start + len(token_ids) for token_ids, start, _ in parts]),
        block_tables=_int64([blocks + [0] * (max_blocks - len(blocks)) for _, _, blocks in parts]),
        slots=_int64(slots),
        logit_rows=_int64(logit_rows),
    )


def split(plan: StepPlan, output: RunnerOutput, vocab: int) -> list[SequenceUpdate]:
    """Return the results of each planned sequence; `vocab` is the vocabulary size."""
    updates: list[SequenceUpdate] = []
    sampled_row = prompt_row = hidden_row = 0
    for sequence in plan.sequences:
        num_prompt_rows = len(sequence.prompt_logprob_positions)
        prompt_logprobs = output.prompt_logprobs[prompt_row : prompt_row + num_prompt_rows]
        prompt_row += num_prompt_rows
        is_finite = not any(math.isnan(position.logprobs[0]) for position in prompt_logprobs)
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        hidden = None
        if sequence.samples:
            end = sampled_row + 1 + len(sequence.drafted)
            token_ids = accepted(output.token_ids[sampled_row:end], sequence.drafted)
            given = output.logprobs[sampled_row : sampled_row + len(token_ids)]
            logprobs = tuple(each for each in given if each is not None)
            sampled_row = end
            if not token_ids:  # the settings ban all tokens, or the logits are not finite
                is_finite = not allowed_mask(sequence.request, vocab).any()
        elif sequence.hidden_positions and output.hidden is not None:
            hidden = output.hidden[hidden_row : hidden_row + len(sequence.hidden_positions)]
            hidden_row += len(sequence.hidden_positions)
            is_finite = is_finite and bool(np.isfinite(hidden).all())
        updates.append(
            SequenceUpdate(
                sequence.request, token_ids, logprobs, prompt_logprobs, hidden, is_finite
            )
        )
    return updates


def accepted(drawn: Sequence[int | None], drafted: Sequence[int]) -> tuple[int, ...]:
    """Return the drawn tokens up to the first that is not the drafted one, and this one too.

    A row without a token ends them before it: the next step computes it again, and reports it.
    """
    tokens: list[int] = []
    for index, token_id in enumerate(drawn):
        if token_id is None:
            break
        tokens.append(token_id)
        if index < len(drafted) and token_id != drafted[index]:
            break
    return tuple(tokens)


def _rows(
    sequences: Sequence[PlannedSequence], starts: list[int]
) -> tuple[list[int], LogitRows, list[SampledRow]]:
    """Return the rows that need logits or hidden states, their use, and the sampled rows.

    `starts` are the first rows of the sequences that compute tokens.
    """
    logit_rows: list[int] = []
    sampled: list[SampledRow] = []
    sampled_rows: list[int] = []
    prompt_rows: list[int] = []
    prompt_tokens: list[int] = []
    prompt_counts: list[int] = []
    hidden_rows: list[int] = []
    last_rows: dict[str, int] = {}
    begins = iter(starts)
    for sequence in sequences:
        request = sequence.request
        if sequence.source is not None:
            last_rows[request.request_id] = last_rows[sequence.source.request_id]
        else:
            start = next(begins)
            last_rows[request.request_id] = start + sequence.count - 1 - len(sequence.drafted)
        for position in sequence.prompt_logprob_positions:
            prompt_rows.append(len(logit_rows))
            prompt_tokens.append(request.tokens[position])
            prompt_counts.append(request.sampling.prompt_logprobs or 0)
            logit_rows.append(start + position - 1 - sequence.start)
        for position in sequence.hidden_positions:
            hidden_rows.append(len(logit_rows))
            logit_rows.append(start + position - sequence.start)
        if sequence.samples:
            last_row = last_rows[request.request_id]
            for count in range(1 + len(sequence.drafted)):
                sampled.append(SampledRow(request, sequence.drafted[:count]))
                sampled_rows.append(len(logit_rows))
                logit_rows.append(last_row + count)
    prompt = (
        PromptRows(_int64(prompt_rows), _int64(prompt_tokens), _int64(prompt_counts))
        if prompt_rows
        else NO_PROMPT_ROWS
    )
    hidden = _int64(hidden_rows) if hidden_rows else _NONE
    return logit_rows, LogitRows(_int64(sampled_rows), prompt, hidden), sampled


def sampling_settings(rows: Sequence[SampledRow]) -> SamplingSettings:
    """Return the settings of rows that get a token."""
    settings = np.frombuffer(
        b"".join([row.request.packed_settings or _pack_settings(row.request) for row in rows]),
        dtype=ROW_SETTINGS,
    )
    allowed = {
        number: np.frombuffer(ids, dtype=np.int64)
        for number, row in enumerate(rows)
        if (ids := row.request.rules.allowed) is not None
    }
    by_grammar = {
        number: _allowed_by_grammar(row)
        for number, row in enumerate(rows)
        if row.request.grammar is not None
    }
    allowed |= {number: ids for number, ids in by_grammar.items() if ids.size}
    allowed_ids = [allowed.get(number, _NONE) for number in range(len(rows))]
    edit_ids, edit_values = _edits(rows, by_grammar)
    seen = [row.seen for row in rows]
    return SamplingSettings(
        allowed=_token_lists(allowed_ids, np.concatenate([_NONE, *allowed_ids])),
        edits=_token_lists(edit_ids, _joined(edit_ids, np.int64)),
        edit_values=_joined(edit_values, np.float32),
        history=_token_lists(
            [each.ids for each in seen], _joined([each.ids for each in seen], np.int64)
        ),
        history_counts=_joined([each.counts for each in seen], np.int64),
        positions=_int64([len(row.request.tokens) + len(row.drafted) for row in rows]),
        **{name: settings[name] for name in ROW_SETTINGS.names or ()},
    )


def _pack_settings(request: Request) -> bytes:
    """Return a request's settings as an item of ROW_SETTINGS, and cache it in the request.

    Joining the cached bytes is faster than reading every setting at every step.
    """
    params = request.sampling
    values: dict[str, float] = {
        name: getattr(params, name) for name in ROW_SETTINGS.names or () if hasattr(params, name)
    }
    values |= {
        "temperature": 0.0 if params.is_greedy else params.temperature,
        "num_logprobs": -1 if params.logprobs is None else params.logprobs,
        "choices": request.choice_index,
        "seeds": request.seed & _SEED_MASK,
    }
    request.packed_settings = np.array(
        [tuple(values[name] for name in ROW_SETTINGS.names or ())], dtype=ROW_SETTINGS
    ).tobytes()
    return request.packed_settings


def _edits(
    rows: Sequence[SampledRow], by_grammar: Mapping[int, Int64s]
) -> "tuple[list[array[int]], list[array[float]]]":
    """Return the ids and values of each row's logit edits: biases, and minus infinity for bans.

    `by_grammar` maps the rows with a grammar to their allowed tokens. Such a row needs no edits to
    ban the other tokens, unless no token is allowed: an empty list would allow all tokens.
    """
    ids: list[array[int]] = []
    values: list[array[float]] = []
    for number, row in enumerate(rows):
        rules = row.request.rules
        row_ids, row_values = rules.bias_ids, rules.bias_values
        forbidden: Iterable[int] = ()
        if number not in by_grammar:
            forbidden = forbidden_tokens(row.request, row.drafted)
        elif row.request.grammar is not None and not by_grammar[number].size:
            forbidden = range(row.request.grammar.vocab)
        if forbidden:
            edits = dict(zip(row_ids, row_values, strict=True)) | dict.fromkeys(forbidden, -np.inf)
            row_ids, row_values = array("q", edits.keys()), array("f", edits.values())
        ids.append(row_ids)
        values.append(row_values)
    return ids, values


def allowed_mask(request: Request, vocab: int) -> Mask:
    """Return a mask [vocab] of the tokens that all settings of a request together allow next."""
    mask = _restricted(
        SampledRow(request),
        request.grammar.allowed_mask()
        if request.grammar is not None
        else np.ones(vocab, dtype=np.bool_),
    )
    mask[
        [
            token
            for token, bias in zip(request.rules.bias_ids, request.rules.bias_values, strict=True)
            if bias == -np.inf
        ]
    ] = False
    return mask


def _allowed_by_grammar(row: SampledRow) -> Int64s:
    """Return the ids that a request's grammar and other settings allow, ignoring biases."""
    request = row.request
    assert request.grammar is not None
    if request.rules.allowed is None and not forbidden_tokens(request, row.drafted):
        return request.grammar.allowed_ids(len(row.drafted))
    mask = request.grammar.allowed_mask(len(row.drafted))
    return np.flatnonzero(_restricted(row, mask))


def _restricted(row: SampledRow, mask: Mask) -> Mask:
    """Clear the tokens of `mask` that a request's settings ban, ignoring biases; return it."""
    request = row.request
    mask[list(forbidden_tokens(request, row.drafted))] = False
    if request.rules.allowed is not None:
        others = np.zeros_like(mask)
        others[np.frombuffer(request.rules.allowed, dtype=np.int64)] = True
        mask &= others
    return mask


def forbidden_tokens(request: Request, drafted: Sequence[int] = ()) -> set[int]:
    """Return the tokens that are banned only where they follow a request's tokens and `drafted`.

    These are the stop tokens and the end-of-text token before min_tokens, and the tokens that would
    complete a bad word. Bad words of one token are biases, see TokenRules.
    """
    forbidden: set[int] = set()
    num_output_tokens = request.num_output_tokens + len(drafted)
    if request.rules.has_bad_sequences:
        tokens = [*request.tokens, *drafted] if drafted else request.tokens
        forbidden.update(request.rules.banned_next_tokens(tokens, num_output_tokens))
    if num_output_tokens < request.sampling.min_tokens:
        forbidden |= request.stop_token_ids | request.ignored_eos_token_ids
    return forbidden


def _token_lists(lists: Sequence[Sized], token_ids: Int64s) -> TokenLists:
    """Return ragged lists with the lengths of `lists`; `token_ids` is their concatenation."""
    starts = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens in lists], out=starts[1:])
    return TokenLists(starts, token_ids)


def _joined(
    lists: "Sequence[array[int]] | Sequence[array[float]]", dtype: type[D]
) -> "np.ndarray[tuple[int], np.dtype[D]]":
    """Return the arrays concatenated, as a copy: an array with an exported buffer cannot grow."""
    return np.frombuffer(b"".join(lists), dtype=dtype)


def _int64(values: Sequence[int] | object) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.array(values, dtype=np.int64)


_NONE = _int64([])
