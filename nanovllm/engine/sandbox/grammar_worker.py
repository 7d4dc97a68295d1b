"""Compile grammars by llguidance, and compute token masks for the sequences that use them.

    -> load     n_vocab, eos_token_ids;                  <- loaded | failed: message
                body: tokenizer.json
    -> compile  grammar (number), source,                <- compiled: num_bytes, cpu_s;
                memory_bytes, cpu_s                         body: first mask
                                                         <- invalid: message
    -> next     sequences; a grammar and tokens          <- masks: sequences, cpu_s, sizes, errors,
                for each; cpu_s, paths                      paths; body: the masks
    -> free     sequences, grammars

`next` accepts tokens, and requests the mask of the token after them. A reply `masks` covers one or
several `next`, or a part of one. `sizes` are those of the masks in bytes; `errors` is {index in
`sequences`: message}. A mask has one bit per token, the lowest bit of a byte first. A sequence
starts with its first `next`. The parent sends `compile` only while no masks are computed.

A path has tokens that may come next, and is followed without a request; see grammar_path.py. In
`next`, `paths` is {index in `sequences`: a PathRequest}; in `masks` it is {index: [the tokens,
how many of them are forced, whether the sequence must start again]}, and the masks after these
tokens follow the sequence's mask.

A worker that reaches a limit ends without a reply. Before each mask it notes the number of the
sequence, so that the parent knows for which one it has ended; before a path it adds PATH_NOTE.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nanovllm.engine.sandbox import limits
from nanovllm.engine.sandbox.gbnf import gbnf_to_lark, is_gbnf
from nanovllm.engine.sandbox.grammar_path import Path, PathFinder, PathRequest
from nanovllm.engine.sandbox.json_digits import DigitLimitedMatcher
from nanovllm.engine.sandbox.json_schemas import close_objects
from nanovllm.engine.sandbox.messages import PATH_NOTE, Channel

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


class _Sequence(NamedTuple):
    """A sequence: its matcher, and what finds its paths."""

    matcher: Any
    paths: PathFinder


class _MaskRequest(NamedTuple):
    """A request for the mask after more tokens, and perhaps for a path."""

    grammar: int
    tokens: list[int]
    path: PathRequest | None


def serve(channel: Channel) -> None:
    """Load the library and the tokenizer, then serve requests until the socket closes."""
    library = _load(channel)
    if library is not None:
        _Worker(channel, library).serve()


def _load(channel: Channel) -> Library | None:
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


class _Worker:
    def __init__(self, channel: Channel, library: Library) -> None:
        self._channel = channel
        self._library = library
        self._grammars: dict[int, Any] = {}  # {number: matcher at the first position}
        self._sequences: dict[int, _Sequence] = {}  # by number
        self._pending: dict[int, _MaskRequest | None] = {}  # by sequence; None once it was freed

    def serve(self) -> None:
        """Serve requests in their order. Sequences that `free` names have an empty mask."""
        cpu_s = 0.0
        while True:
            channel = self._channel
            messages = channel.receive_ready() if self._pending else channel.receive_all()
            if messages is None:
                return
            for header, _ in messages:
                if header["op"] == "next":
                    cpu_s = header["cpu_s"]
                    self._pending.update(_mask_requests(header))
                elif header["op"] == "compile":
                    self._compile(header)
                else:
                    self._free(header["sequences"], header["grammars"])
            if self._pending:
                self._send_masks(cpu_s)

    def _free(self, sequences: list[int], grammars: list[int]) -> None:
        for sequence in sequences:
            self._sequences.pop(sequence, None)
            if sequence in self._pending:
                self._pending[sequence] = None
        for grammar in grammars:
            self._grammars.pop(grammar, None)
        if grammars:
            limits.release_memory()

    def _compile(self, header: dict[str, Any]) -> None:
        """Compile on a thread of low priority. Masks are computed at normal priority."""

        def work() -> None:
            limits.lower_priority(_COMPILE_NICE)
            try:
                matcher, reply, mask = _compile(self._library, header["source"])
            except MemoryError:
                os._exit(limits.MEMORY_EXIT_CODE)
            except ValueError as error:
                self._channel.send({"op": "invalid", "message": describe_error(str(error))})
            except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
                self._channel.send({"op": "invalid", "message": f"the library fails: {error}"})
            else:
                self._grammars[header["grammar"]] = matcher
                self._channel.send({"op": "compiled", **reply}, mask)

        threading.stack_size(limits.STACK_BYTES)
        limits.limit_memory(header["memory_bytes"])
        with limits.limited_cpu(header["cpu_s"]):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        limits.limit_memory(_HEADROOM_BYTES)

    def _send_masks(self, mask_cpu_s: float) -> None:
        """Compute pending masks for `_REPLY_S`, and send them in one reply."""
        sequences: list[int] = []
        cpu_s: list[float] = []
        sizes: list[int] = []
        errors: dict[int, str] = {}
        paths: dict[int, tuple[Sequence[int], int, bool]] = {}
        masks: list[bytes] = []
        end_s = time.monotonic() + _REPLY_S
        with limits.cpu_limiter() as limit_cpu:
            while self._pending and (not sequences or time.monotonic() < end_s):
                number = next(iter(self._pending))
                request = self._pending.pop(number)
                limit_cpu(mask_cpu_s)
                mask, error = b"", None
                before_s = time.thread_time()
                if request is not None:
                    self._channel.note(number)
                    mask, error = self._next_mask(number, request)
                cpu_s.append(time.thread_time() - before_s)
                sizes.append(len(mask))
                masks.append(mask)
                if error is not None:
                    errors[len(sequences)] = error
                elif request is not None and request.path is not None:
                    limit_cpu(mask_cpu_s)
                    self._channel.note(number | PATH_NOTE)
                    path = self._find_path(number, mask, request.path)
                    paths[len(sequences)] = path.tokens, path.num_forced, path.is_lost
                    masks += path.masks
                sequences.append(number)
            self._channel.note(0)
        header = {"op": "masks", "sequences": sequences, "cpu_s": cpu_s, "sizes": sizes}
        self._channel.send({**header, "errors": errors, "paths": paths}, b"".join(masks))

    def _next_mask(self, number: int, request: _MaskRequest) -> tuple[bytes, str | None]:
        """Accept tokens. Return the mask of the next token and an error, if any."""
        sequence = self._sequences.get(number)
        if sequence is None:
            sequence = _Sequence(self._grammars[request.grammar].deep_copy(), PathFinder())
            self._sequences[number] = sequence
        matcher = sequence.matcher
        sequence.paths.tokens.extend(request.tokens)
        try:
            matcher.consume_tokens(request.tokens)
            mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
            return b"", f"the library fails: {error}"
        return (b"", describe_error(matcher.get_error())) if matcher.is_error() else (mask, None)

    def _find_path(self, number: int, mask: bytes, request: PathRequest) -> Path:
        """Return tokens that may come next; forget the sequence where its matcher is lost."""
        matcher, paths = self._sequences[number]
        path = paths.find(matcher, mask, self._library.tokenizer, request)
        if path.is_lost:
            del self._sequences[number]
        return path


def _mask_requests(header: dict[str, Any]) -> Iterator[tuple[int, _MaskRequest]]:
    """Iterate over the sequences of a `next` message, and what is requested for each."""
    paths = header.get("paths", {})
    items = zip(header["sequences"], header["grammars"], header["tokens"], strict=True)
    for index, (sequence, grammar, tokens) in enumerate(items):
        path = paths.get(str(index))
        yield sequence, _MaskRequest(grammar, tokens, path and PathRequest(*path))


def _compile(library: Library, source: dict[str, Any]) -> tuple[Any, dict[str, Any], bytes]:
    """Return a grammar's matcher, the header of the reply and the first mask.

    Raises ValueError where the grammar is invalid.
    """
    bytes_before, before_s = limits.private_bytes(), time.thread_time()
    matcher_of = library.module.LLMatcher
    parser_limits = library.module.LLParserLimits(**_PARSER_LIMITS)
    text = _notation(matcher_of, source)
    matcher = matcher_of(library.tokenizer, text, log_level=0, limits=parser_limits)
    if source.keys() & {"json", "closed_json"}:
        matcher = DigitLimitedMatcher(matcher, library.tokenizer)
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    num_bytes = max(0, limits.private_bytes() - bytes_before)
    return matcher, {"num_bytes": num_bytes, "cpu_s": time.thread_time() - before_s}, mask


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


def describe_error(error: str) -> str:
    """Return an error of the library, in our words where the grammar exceeds a limit."""
    return next((ours for part, ours in _LIMIT_ERRORS.items() if part in error), error)
