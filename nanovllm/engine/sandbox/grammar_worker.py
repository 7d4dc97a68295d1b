"""Compile one grammar by llguidance, and compute token masks for the sequences that use it.

    -> load     n_vocab, eos_token_ids;                <- loaded | failed: message
                body: tokenizer.json
    -> compile  grammar, memory_bytes, cpu_s,          <- compiled: num_bytes; body: first mask
                mask_cpu_s                             <- invalid: message
    -> next     sequences,                             <- masks: sequences, cpu_s, sizes, errors;
                tokens (a list per sequence)              body: the masks
    -> free     sequences

`next` accepts tokens, and requests the mask of the token after them. A reply `masks` covers one or
several `next`, or a part of one. `sizes` are those of the masks in bytes; `errors` is {index in
`sequences`: message}. A worker that reaches a limit ends without a reply. A mask has one bit per
token, the lowest bit of a byte first. A sequence starts with its first `next`.
"""

import json
import os
import threading
import time
from typing import Any, NamedTuple

from nanovllm.engine.sandbox import limits
from nanovllm.engine.sandbox.gbnf import gbnf_to_lark, is_gbnf
from nanovllm.engine.sandbox.json_digits import DigitLimitedMatcher
from nanovllm.engine.sandbox.json_schemas import close_objects
from nanovllm.engine.sandbox.messages import Channel

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it. With unlimited white space, a small model may write nothing else."""
_COMPILE_NICE = 10
_PARSER_LIMITS = {
    "step_max_items": 20_000,  # the library's 50,000 take a second per mask
    "max_lexer_states": 50_000,  # instead of 250,000, at one to two KB each
    "max_grammar_size": 100_000,  # instead of 500,000; the text is limited to 64 KiB
    "verbose_errors": False,
}
_LIMIT_ERRORS = {
    "too deeply nested": "the grammar is nested too deeply; make it simpler",
    "too big (limit": "the grammar is too large; make it smaller",
    "Too many items": "the grammar is too ambiguous for its size; make it simpler",
}
"""{part of an error of the library: our error}. The library's quotes the translated grammar."""
_REPLY_S = 0.005  # batches of masks that take longer are sent in parts
_HEADROOM_BYTES = 64 << 20  # memory for masks, beyond that of the compiled grammar


class Library(NamedTuple):
    """llguidance with the model's tokenizer."""

    module: Any
    tokenizer: Any


def load(channel: Channel) -> Library | None:
    """Handle the first message. Return None where the library does not support the tokenizer."""
    received = channel.receive()
    if received is None:
        return None
    header, text = received
    try:
        import llguidance  # noqa: PLC0415 - slow to import

        tokenizer = llguidance.LLTokenizer(
            text.decode(), n_vocab=header["n_vocab"], eos_token=header["eos_token_ids"]
        )
    except Exception as error:  # noqa: BLE001 - the library documents no exception
        channel.send({"op": "failed", "message": str(error)})
        return None
    channel.send({"op": "loaded"})
    return Library(llguidance, tokenizer)


def serve_grammar(channel: Channel, library: Library) -> None:
    """Compile the grammar of the first message, then serve masks until the socket closes."""
    received = channel.receive()
    if received is None:
        return
    try:
        matcher = _compile_on_thread(channel, library, received[0])
        if matcher is not None:
            _serve_masks(channel, matcher, received[0]["mask_cpu_s"])
    except MemoryError:
        os._exit(limits.MEMORY_EXIT_CODE)


def _compile_on_thread(channel: Channel, library: Library, header: dict[str, Any]) -> Any:
    """Compile on a thread of low priority. Masks are computed later at normal priority."""
    results: list[Any] = []

    def work() -> None:
        limits.lower_priority(_COMPILE_NICE)
        try:
            results.append(_compile(channel, library, header))
        except MemoryError:
            os._exit(limits.MEMORY_EXIT_CODE)
        except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
            channel.send({"op": "invalid", "message": f"the library fails: {error}"})
            results.append(None)

    threading.stack_size(limits.STACK_BYTES)
    limits.limit_memory(header["memory_bytes"])
    with limits.limited_cpu(header["cpu_s"]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return results[0]


def _compile(channel: Channel, library: Library, header: dict[str, Any]) -> Any:
    """Compile, and send the first mask. Return None where the grammar is invalid."""
    before = limits.private_bytes()
    matcher_of = library.module.LLMatcher
    parser_limits = library.module.LLParserLimits(**_PARSER_LIMITS)
    try:
        text = _notation(matcher_of, header["grammar"])
        matcher = matcher_of(library.tokenizer, text, log_level=0, limits=parser_limits)
        if header["grammar"].keys() & {"json", "closed_json"}:
            matcher = DigitLimitedMatcher(matcher, library.tokenizer)
    except ValueError as error:
        channel.send({"op": "invalid", "message": describe_error(str(error))})
        return None
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        channel.send({"op": "invalid", "message": describe_error(matcher.get_error())})
        return None
    limits.limit_memory(_HEADROOM_BYTES)
    num_bytes = max(0, limits.private_bytes() - before)
    channel.send({"op": "compiled", "num_bytes": num_bytes}, mask)
    return matcher


def _notation(matcher_of: Any, grammar: dict[str, Any]) -> str:
    """Return the grammar in the library's own notation; raises ValueError."""
    [(kind, value)] = grammar.items()
    if kind == "regex":
        return str(matcher_of.grammar_from_regex(value))
    if kind == "grammar":
        return str(matcher_of.grammar_from_lark(gbnf_to_lark(value) if is_gbnf(value) else value))
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return str(matcher_of.grammar_from_lark(f"start: {texts}"))
    if kind == "closed_json":
        close_objects(value)
    return str(matcher_of.grammar_from_json_schema(value, overrides=_JSON))


def _serve_masks(channel: Channel, root: Any, mask_cpu_s: float) -> None:
    """Serve masks in the order of requests until the socket closes.

    One reply has the masks of all sequences, unless they take longer than `_REPLY_S`. Sequences
    that a `free` names meanwhile are skipped.
    """
    matchers: dict[int, Any] = {}
    pending: dict[int, list[int]] = {}
    while True:
        messages = channel.receive_all() if not pending else channel.receive_ready()
        if messages is None:
            return
        for header, _ in messages:
            if header["op"] == "free":
                for sequence in header["sequences"]:
                    matchers.pop(sequence, None)
                    pending.pop(sequence, None)
            else:
                pending.update(zip(header["sequences"], header["tokens"], strict=True))
        if pending:
            _send_masks(channel, root, matchers, pending, mask_cpu_s)


def _send_masks(
    channel: Channel,
    root: Any,
    matchers: dict[int, Any],
    pending: dict[int, list[int]],
    mask_cpu_s: float,
) -> None:
    """Compute masks of `pending` sequences for `_REPLY_S`, remove them from it and send them."""
    sequences: list[int] = []
    cpu_s: list[float] = []
    errors: dict[int, str] = {}
    masks: list[bytes] = []
    end_s = time.monotonic() + _REPLY_S
    with limits.cpu_limiter() as limit_cpu:
        before_s = time.thread_time()
        while pending and (not sequences or time.monotonic() < end_s):
            sequence = next(iter(pending))
            tokens = pending.pop(sequence)
            limit_cpu(mask_cpu_s)
            matcher = matchers.get(sequence)
            if matcher is None:
                matcher = matchers[sequence] = root.deep_copy()
            mask, error = _next_mask(matcher, tokens)
            after_s = time.thread_time()
            sequences.append(sequence)
            cpu_s.append(after_s - before_s)
            masks.append(mask)
            if error is not None:
                errors[len(sequences) - 1] = error
            before_s = after_s
    header = {"op": "masks", "sequences": sequences, "cpu_s": cpu_s, "errors": errors}
    channel.send({**header, "sizes": [len(mask) for mask in masks]}, b"".join(masks))


def _next_mask(matcher: Any, tokens: list[int]) -> tuple[bytes, str | None]:
    """Accept tokens. Return the mask of the next token and an error, if any."""
    try:
        matcher.consume_tokens(tokens)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        return b"", f"the library fails: {error}"
    return (b"", describe_error(matcher.get_error())) if matcher.is_error() else (mask, None)


def describe_error(error: str) -> str:
    """Return an error of the library, in our words where the grammar exceeds a limit."""
    return next((ours for part, ours in _LIMIT_ERRORS.items() if part in error), error)
