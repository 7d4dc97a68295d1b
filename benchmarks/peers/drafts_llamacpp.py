"""llama.cpp with drafts: the method of its server, driven by its C interface from Python.

Drafted tokens of all sequences are verified in one llama_decode. The binding has none of
llama.cpp's `common/speculative`. N-grams are those of llama-cpp-python; a draft model drafts as
`draft-simple` of llama.cpp does, with its default length.

A variant is JSON: the type of the weights, the method of drafting, and the draft model's folder.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.llamacpp import Context, Item, open_library, open_model
from benchmarks.worker import serve

_FILES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
_NGRAM_TOKENS = 2  # of a draft; llama-cpp-python recommends 2 for CPUs
_DRAFTED_TOKENS = 3  # of a draft model, the default of llama.cpp


@dataclass(slots=True)
class Text:
    """A prompt and its output; `in_draft` leading tokens are in the draft model's cache."""

    slot: int
    tokens: list[int]
    end: int
    draws: np.random.Generator
    in_draft: int = 0

    @property
    def room(self) -> int:
        """Return how many tokens may be drafted, with one more sampled after them."""
        return self.end - len(self.tokens) - 1


Propose = Callable[[list[Text]], list[list[int]]]


class ModelDrafts:
    """Drafts of a draft model, greedy, a step of all sequences at once."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def begin(self, texts: list[Text]) -> None:
        """Compute the prompts, all but the last token of each text."""
        self._context.clear()
        self._context.decode(
            [
                (token, position, text.slot, False)
                for text in texts
                for position, token in enumerate(text.tokens[:-1])
            ]
        )
        for text in texts:
            text.in_draft = len(text.tokens) - 1

    def __call__(self, texts: list[Text]) -> list[list[int]]:
        """Return the drafted tokens of each text."""
        drafts: list[list[int]] = [[] for _ in texts]
        for text in texts:
            text.in_draft = min(text.in_draft, len(text.tokens) - 1)
            self._context.cut(text.slot, text.in_draft)
        for _ in range(_DRAFTED_TOKENS):
            items: list[Item] = []
            places: dict[int, int] = {}
            for index, text in enumerate(texts):
                known = [*text.tokens, *drafts[index]]
                if len(drafts[index]) < text.room:
                    items += [
                        (known[position], position, text.slot, position == len(known) - 1)
                        for position in range(text.in_draft, len(known))
                    ]
                    places[index], text.in_draft = len(items) - 1, len(known)
            if not items:
                break
            self._context.decode(items)
            for index, place in places.items():
                drafts[index].append(int(self._context.logits(place).argmax()))
        return drafts


class Speculation:
    """Decoding of texts, each with its slot, with or without drafts."""

    def __init__(self, context: Context, propose: Propose | None) -> None:
        self._context = context
        self._propose = propose

    def generate(
        self, prompts: list[list[int]], lengths: list[int], temperature: float, seed: int
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Complete all prompts; return tokens, and time and drafts after their first tokens."""
        texts = [
            Text(slot, list(prompt), len(prompt) + length, np.random.default_rng((seed, slot)))
            for slot, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        self._context.clear()
        self._step(texts, [[] for _ in texts], temperature, is_prompt=True)
        if isinstance(self._propose, ModelDrafts):
            self._propose.begin(texts)
        drafted = accepted = 0
        started_s = time.perf_counter()
        while active := [text for text in texts if len(text.tokens) < text.end]:
            drafts = [[] for _ in active] if self._propose is None else self._propose(active)
            drafted += sum(map(len, drafts))
            accepted += self._step(active, drafts, temperature)
        seconds = time.perf_counter() - started_s
        answers = [text.tokens[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        tokens = sum(lengths) - len(lengths)
        return answers, {
            "seconds": seconds, "tokens": tokens, "drafted": drafted, "accepted": accepted,
        }  # fmt: skip

    def _step(
        self,
        texts: list[Text],
        drafts: list[list[int]],
        temperature: float,
        is_prompt: bool = False,
    ) -> int:
        """Compute the last token and the draft of each text; return how many were accepted."""
        items: list[Item] = []
        places = []
        for text, draft in zip(texts, drafts, strict=True):
            last = len(text.tokens) - 1
            start = 0 if is_prompt else last
            new = [*text.tokens[start:], *draft]
            items += [
                (token, position, text.slot, position >= last)
                for position, token in enumerate(new, start)
            ]
            places.append(len(items) - len(draft) - 1)
        self._context.decode(items)
        accepted = 0
        for text, draft, place in zip(texts, drafts, places, strict=True):
            for index, guess in enumerate([*draft, None]):
                token = _sample(self._context.logits(place + index), temperature, text.draws)
                text.tokens.append(token)
                if token != guess:
                    break
                accepted += 1
            self._context.cut(text.slot, len(text.tokens) - 1)
        return accepted


def _sample(logits: Any, temperature: float, draws: np.random.Generator) -> int:
    if not temperature:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / np.float32(temperature)).cumsum(dtype=np.float64)
    return int(np.searchsorted(weights, draws.random() * weights[-1], side="right"))


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load the models, whose GGUF files are made if missing."""
    options = json.loads(variant)
    library = open_library()
    loaded = _open(library, model, options["type"])
    method = options["method"]
    draft = _open(library, Path(options["draft"]), options["type"]) if method == "draft" else None
    runs: dict[int, Speculation] = {}

    def run_of(streams: int) -> Speculation:
        """Return what runs a number of prompts at once, with contexts of its own."""
        if streams not in runs:
            propose: Propose | None = None
            if draft is not None:
                propose = ModelDrafts(Context(library, draft, streams, threads))
            elif method == "ngram":
                propose = _ngrams()
            runs[streams] = Speculation(Context(library, loaded, streams, threads), propose)
        return runs[streams]

    def generate(
        prompts: list[list[int]], lengths: list[int], temperature: float, seed: int
    ) -> tuple[list[list[int]], dict[str, Any]]:
        return run_of(len(prompts)).generate(prompts, lengths, temperature, seed)

    return generate, {"versions": {"llama-cpp-python": library.__version__}}


def _open(library: Any, folder: Path, kind: str) -> Any:
    name = _FILES[kind]
    if not (folder / f"{name}.gguf").is_file():
        from benchmarks.peers import make_gguf  # noqa: PLC0415 - needs gguf

        make_gguf.write(folder, name)
    return open_model(library, folder / f"{name}.gguf")


def _ngrams() -> Propose:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: PLC0415 - as above

    lookup = LlamaPromptLookupDecoding(num_pred_tokens=_NGRAM_TOKENS)
    return lambda texts: [
        lookup(np.array(text.tokens, np.intc)).tolist()[: max(0, text.room)] for text in texts
    ]


if __name__ == "__main__":
    serve(load)
