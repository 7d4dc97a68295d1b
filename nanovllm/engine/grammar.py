"""Grammars that answers follow, token by token, by the llguidance library (https://github.com/guidance-ai/llguidance).

A grammar says which tokens may come next; the sampler draws among those, and the grammar is told which one was drawn:

    compile  text of a grammar -> its beginning      once for equal wishes
    start    beginning -> a place of its own         for each sequence; a preempted sequence keeps it
    allowed  place -> which tokens may follow        at each step
    accept   place, token -> the next place

Where the text may end, the end of text is among the tokens that may follow; where it must, it is the only one.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from nanovllm.structured_outputs import StructuredOutputs

_KEPT = 64  # compiled grammars
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it. With any amount of white space, a small model may never get beyond it."""
_PARAM = "structured_outputs"


class Grammar:
    """A place in a grammar; for one sequence and one thread."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        """Stand where `matcher`, an LLMatcher, stands; it is this object's from now on."""
        self._matcher = matcher
        self._vocab = vocab

    def start(self) -> "Grammar":
        """The same place, to go on from independently."""
        return Grammar(self._matcher.deep_copy(), self._vocab)

    def allowed(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Whether each token of the model's vocabulary may come next; none where the grammar cannot be followed any further."""
        allowed = np.zeros(self._vocab, dtype=np.bool_)
        if not self._matcher.is_error():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            found = np.unpackbits(bits, bitorder="little")[: self._vocab]
            allowed[: found.size] = found
        return allowed

    def accept(self, token_id: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token_id)


class Grammars:
    """Compiles grammars for one tokenizer. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_token_ids: Sequence[int]) -> None:
        """For a model of `vocab` tokens whose answers end with one of `eos_token_ids`."""
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos_token_ids = list(eos_token_ids)
        self._library: Any = None
        self._library_tokenizer: Any = None
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """The beginning of a grammar; raises InvalidRequestError where it is none, is too large, or the library is missing."""
        key = wanted.key
        with self._lock:
            self._load()
            known = self._compiled.get(key)
            if known is not None:
                self._compiled.move_to_end(key)
                return known
            matcher = self._library.LLMatcher(
                self._library_tokenizer, self._text(wanted), log_level=0
            )
            if matcher.is_error():
                raise InvalidRequestError(
                    f"structured_outputs cannot be used: {_first_lines(matcher.get_error())}",
                    param=_PARAM,
                )
            grammar = self._compiled[key] = Grammar(matcher, self._vocab)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return grammar

    def _load(self) -> None:
        """Import the library and show it the tokenizer, which takes a moment, when the first grammar is asked for."""
        if self._library_tokenizer is not None:
            return
        if not self._eos_token_ids:
            raise InvalidRequestError(
                "structured_outputs needs an end of text, which this model does not have (eos_token_id)",
                param=_PARAM,
            )
        try:
            import llguidance  # noqa: PLC0415 - an extra
        except ImportError:
            message = "answers of a form need the package llguidance, an extra that is not installed here; pip install 'nanovllm[structured]'"
            raise InvalidRequestError(message, param=_PARAM) from None
        vocab = max(self._vocab, self._tokenizer.vocab)
        try:
            self._library_tokenizer = llguidance.LLTokenizer(
                self._tokenizer.as_json(), n_vocab=vocab, eos_token=self._eos_token_ids
            )
        except (
            Exception
        ) as error:  # the library raises all kinds for tokenizers that it does not know
            raise InvalidRequestError(
                f"structured_outputs cannot be used with this tokenizer: {error}", param=_PARAM
            ) from error
        self._library = llguidance

    def _text(self, wanted: StructuredOutputs) -> str:
        """The grammar in the library's own notation."""
        matcher = self._library.LLMatcher
        if wanted.regex is not None:
            return str(matcher.grammar_from_regex(wanted.regex))
        if wanted.grammar is not None:
            return str(matcher.grammar_from_lark(wanted.grammar))
        if wanted.choice is not None:
            return str(
                matcher.grammar_from_lark(
                    "start: "
                    + " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
                )
            )
        schema = {"type": "object"} if wanted.json_object else wanted.json
        return str(matcher.grammar_from_json_schema(schema, overrides=_JSON))


def _first_lines(text: str, limit: int = 300) -> str:
    """The beginning of the library's explanation, on one line."""
    shown = " ".join(text.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
