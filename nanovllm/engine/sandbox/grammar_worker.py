"""Compile one grammar by llguidance and compute token masks for the sequences that follow it.

    -> load     n_vocab, eos_token_ids; body: tokenizer.json       <- loaded | failed: message
    -> compile  grammar, memory_bytes, cpu_s, mask_cpu_s           <- compiled: num_bytes; body: first mask
                                                                   <- invalid: message
    -> next     sequence, tokens (to accept)                       <- mask: sequence, cpu_s; body: mask
                                                                   <- error: sequence, message
    -> free     sequence

A mask has one bit a token, the lowest bit of a byte first. A sequence begins when its first tokens come.
"""

import json
import os
import threading
import time
from typing import Any, NamedTuple

from nanovllm.engine.sandbox import limits
from nanovllm.engine.sandbox.messages import Channel

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it. With any amount of white space, a small model may never get beyond it."""
_COMPILE_NICE = 10
_PARSER_LIMITS = {
    "step_max_items": 20_000,  # of the library's 50,000, which take a second for a mask
    "max_lexer_states": 50_000,  # of 250,000, of one or two kilobytes each
    "max_grammar_size": 100_000,  # of 500,000; the text is limited to 64 KiB
    "verbose_errors": False,
}
_HEADROOM_BYTES = 64 << 20  # what computing masks may add to the memory of a compiled grammar


class Library(NamedTuple):
    """llguidance and a tokenizer that it has read."""

    module: Any
    tokenizer: Any


def load(channel: Channel) -> Library | None:
    """Answer the first message; None where the library does not know the tokenizer."""
    received = channel.receive()
    if received is None:
        return None
    header, text = received
    try:
        import llguidance  # noqa: PLC0415 - takes a moment

        tokenizer = llguidance.LLTokenizer(
            text.decode(), n_vocab=header["n_vocab"], eos_token=header["eos_token_ids"]
        )
    except Exception as error:  # noqa: BLE001 - the library raises all kinds for tokenizers that it does not know
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
        matcher = _compile_apart(channel, library, received[0])
        if matcher is not None:
            _serve_masks(channel, matcher, received[0]["mask_cpu_s"])
    except MemoryError:
        os._exit(limits.MEMORY_EXIT_CODE)


def _compile_apart(channel: Channel, library: Library, header: dict[str, Any]) -> Any:
    """Compile on a thread of low priority, while the main thread keeps the priority that masks need."""
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
    """Compile, compute the first mask and send it; None where the grammar is none."""
    before = limits.private_bytes()
    matcher_of = library.module.LLMatcher
    parser_limits = library.module.LLParserLimits(**_PARSER_LIMITS)
    try:
        text = _notation(matcher_of, header["grammar"])
        matcher = matcher_of(library.tokenizer, text, log_level=0, limits=parser_limits)
    except ValueError as error:
        channel.send({"op": "invalid", "message": str(error)})
        return None
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        channel.send({"op": "invalid", "message": matcher.get_error()})
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
        return str(matcher_of.grammar_from_lark(value))
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return str(matcher_of.grammar_from_lark(f"start: {texts}"))
    return str(matcher_of.grammar_from_json_schema(value, overrides=_JSON))


def _serve_masks(channel: Channel, root: Any, mask_cpu_s: float) -> None:
    """Serve masks in the order in which they are asked for; those of sequences that were freed meanwhile are left out."""
    matchers: dict[int, Any] = {}
    waiting: dict[int, list[int]] = {}
    while True:
        messages = channel.receive_all() if not waiting else channel.receive_ready()
        if messages is None:
            return
        for header, _ in messages:
            sequence = header["sequence"]
            if header["op"] == "free":
                matchers.pop(sequence, None)
                waiting.pop(sequence, None)
            else:
                waiting[sequence] = header["tokens"]
        if waiting:
            sequence = next(iter(waiting))
            tokens = waiting.pop(sequence)
            matcher = matchers.get(sequence)
            if matcher is None:
                matcher = matchers[sequence] = root.deep_copy()
            with limits.limited_cpu(mask_cpu_s):
                _send_mask(channel, matcher, sequence, tokens)


def _send_mask(channel: Channel, matcher: Any, sequence: int, tokens: list[int]) -> None:
    start_s = time.thread_time()
    try:
        matcher.consume_tokens(tokens)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        message = f"the library fails: {error}"
        channel.send({"op": "error", "sequence": sequence, "message": message})
        return
    if matcher.is_error():
        channel.send({"op": "error", "sequence": sequence, "message": matcher.get_error()})
        return
    cpu_s = time.thread_time() - start_s
    channel.send({"op": "mask", "sequence": sequence, "cpu_s": cpu_s}, mask)
