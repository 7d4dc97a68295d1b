"""Requests of a soak, drawn from a seed: with known outputs, random ones, and invalid ones."""

import importlib.util
import random
from dataclasses import dataclass, replace
from typing import Any

from tests.load.wire import HOST_HEADER, head, post

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
MAX_BODY_BYTES = 1 << 17  # of the server under load
CONTEXT, VOCAB = 512, 2048  # of the bundled model
_TEXT = (
    "the a and of to was in he she it that had once upon time king old house sea night child went "
    "said little great would could forest river window morning mother father door light never "
    "before under stone ship winter silver heart Tom Alice garden"
)
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: its kind in the report, its path and its body."""

    kind: str
    path: str
    body: dict[str, Any]

    def without_drafts(self) -> "Ask":
        """Return the same request without drafts, which must not change its answer."""
        if self.path == EMBEDDINGS or "use_beam_search" in self.body:  # never drafted
            return self
        return replace(self, body={**self.body, "speculative": False})


def words(draw: random.Random, least: int, most: int) -> str:
    """Return a random text of `least` to `most` words."""
    return " ".join(draw.choices(_TEXT.split(), k=draw.randint(least, most)))


def known_asks(draw: random.Random, copies: int) -> list[Ask]:
    """Return deterministic requests, greedy or seeded; `copies` of each kind."""
    return [ask for _ in range(copies) for ask in _one_of_each(draw)]


def _one_of_each(draw: random.Random) -> list[Ask]:
    def seed() -> dict[str, Any]:
        return {"seed": draw.randrange(1 << 31), "temperature": draw.choice([0.7, 1.0, 1.5])}

    def prompt() -> str:
        return words(draw, 1, 60)

    bodies: dict[str, dict[str, Any]] = {
        "greedy": {
            "prompt": prompt(), "temperature": 0, "max_tokens": draw.randint(1, 60), "logprobs": 3,
        },
        "greedy, several": {
            "prompt": [prompt(), prompt(), prompt()], "temperature": 0, "max_tokens": 12,
            "logprobs": 1,
        },
        "seeded": {"prompt": prompt(), **seed(), "max_tokens": draw.randint(1, 60), "logprobs": 1},
        "seeded, n": {
            "prompt": prompt(), **seed(), "n": draw.randint(2, 4), "max_tokens": 20,
            "logprobs": 0, "top_p": 0.9,
        },
        "best_of": {
            "prompt": prompt(), **seed(), "n": 2, "best_of": 4, "max_tokens": 12, "logprobs": 1,
        },
        "penalties": {
            "prompt": prompt(), **seed(), "max_tokens": 30, "repetition_penalty": 1.2,
            "presence_penalty": 0.5, "frequency_penalty": 0.3,
            "logit_bias": {"5": 2, "17": -100}, "top_k": 40, "min_p": 0.01, "logprobs": 2,
        },
        "stop": {
            "prompt": prompt(), **seed(), "max_tokens": 60, "stop": [" the", ","], "logprobs": 1,
        },
        "scoring": {
            "prompt": words(draw, 20, 150), "echo": True, "max_tokens": 0, "logprobs": 2,
            "temperature": 0,
        },
        "long prompt": {
            "prompt": words(draw, 150, 250), "temperature": 0, "max_tokens": 8, "logprobs": 1,
        },
        "long answer": {
            "prompt": prompt(), **seed(), "max_tokens": 300, "ignore_eos": True, "logprobs": 1,
        },
        "beams": {
            "prompt": words(draw, 1, 20), "use_beam_search": True, "n": 2, "best_of": 3,
            "max_tokens": 8,
        },
    }  # fmt: skip
    if importlib.util.find_spec("llguidance") is not None:
        bodies["regex"] = {
            "prompt": prompt(),
            **seed(),
            "max_tokens": 40,
            "structured_outputs": {"regex": "[a-z]+ (and|or) [a-z]+"},
            "logprobs": 1,
        }
        bodies["choice"] = {
            "prompt": prompt(),
            "temperature": 0,
            "structured_outputs": {"choice": ["yes", "no", "never"]},
            "logprobs": 1,
        }
        bodies["schema"] = {
            "prompt": prompt(),
            **seed(),
            "max_tokens": 60,
            "structured_outputs": {"json": _SCHEMA},
            "logprobs": 1,
        }
    asks = [
        Ask(kind, COMPLETIONS, body if kind == "beams" else {**body, "return_token_ids": True})
        for kind, body in bodies.items()
    ]
    asks += [
        Ask("embeddings", EMBEDDINGS, {"input": [prompt(), prompt()], "pooling": pooling})
        for pooling in ("last", "mean")
    ]
    return asks


def any_ask(draw: random.Random) -> Ask:
    """Return a random request without a seed."""
    body: dict[str, Any] = {"prompt": words(draw, 1, 80), "max_tokens": draw.randint(1, 48)}
    if draw.random() < 0.3:
        body["n"] = draw.randint(2, 6)
    if draw.random() < 0.3:
        body["logprobs"] = draw.randint(0, 20)
    if draw.random() < 0.1:
        body["priority"] = -1  # first; a lower priority could starve under this load
    if draw.random() < 0.1:
        body |= {"cache_salt": draw.choice("abc"), "user": "soak"}
    return Ask("random", COMPLETIONS, body)


def long_ask(draw: random.Random) -> Ask:
    """Return a request with a long output, for clients that disconnect."""
    return Ask(
        "long",
        COMPLETIONS,
        {
            "prompt": words(draw, 1, 40),
            "max_tokens": 350,
            "n": draw.randint(1, 3),
            "ignore_eos": True,
        },
    )


def heavy_ask(draw: random.Random) -> Ask:
    """Return a request with a response of megabytes, larger than socket buffers."""
    settings = {
        "max_tokens": 20,
        "n": 5,
        "ignore_eos": True,
        "logprobs": 20,
        "prompt_logprobs": 20,
        "echo": True,
    }
    return Ask("heavy", COMPLETIONS, {"prompt": words(draw, 320, 340), **settings})


def text_ask(draw: random.Random) -> Ask:
    """Return a tokenize or detokenize request."""
    if draw.random() < 0.5:
        return Ask(
            "tokenize",
            "/tokenize",
            {"prompt": words(draw, 1, 2000), "return_token_strs": draw.random() < 0.3},
        )
    return Ask(
        "detokenize", "/detokenize", {"tokens": draw.choices(range(VOCAB), k=draw.randint(1, 2000))}
    )


def bad_ask(draw: random.Random) -> tuple[str, bytes | dict[str, Any], int]:
    """Return the path, the body and the expected status of an invalid request."""
    prompt = words(draw, 1, 5)
    cases: list[tuple[str, bytes | dict[str, Any], int]] = [
        (COMPLETIONS, b"", 400),
        (COMPLETIONS, b"{", 400),
        (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400),
        (COMPLETIONS, b"[" * 20_000, 400),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400),
        (COMPLETIONS, b'{"prompt": "a", "seed": 1' + b"0" * 3000 + b"}", 400),
        (COMPLETIONS, draw.randbytes(draw.randint(1, 3000)), 400),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', 400),
        (COMPLETIONS, {"prompt": ""}, 400),
        (COMPLETIONS, {"prompt": [1, 2, 10**9]}, 400),
        (COMPLETIONS, {"prompt": {"a": [prompt] * 50}}, 400),
        (COMPLETIONS, {"prompt": prompt, "max_tokens": 10**6}, 400),
        (COMPLETIONS, {"prompt": words(draw, 800, 900)}, 400),
        (COMPLETIONS, {"prompt": prompt, "temperature": -1}, 400),
        (COMPLETIONS, {"prompt": prompt, "max_token": 5}, 400),
        (COMPLETIONS, {f"field{number}": prompt for number in range(300)}, 400),
        (COMPLETIONS, {"prompt": prompt, "n": 128, "best_of": 3}, 400),
        (COMPLETIONS, {"prompt": prompt, "stop": [""] * 40}, 400),
        (COMPLETIONS, {"prompt": prompt, "logit_bias": {"x": 1}}, 400),
        (COMPLETIONS, {"prompt": prompt, "structured_outputs": {"regex": "("}}, 400),
        (COMPLETIONS, {"prompt": prompt, "model": prompt * 9}, 404),
        (EMBEDDINGS, {"input": []}, 400),
        ("/v1/chat/completions", {"messages": [{"role": prompt, "content": prompt}]}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/detokenize", {"tokens": [10**7]}, 400),
        ("/v1/nothing", {"prompt": prompt}, 404),
        ("/health", {"prompt": prompt}, 405),
    ]
    return draw.choice(cases)


def oversized_request(max_body_bytes: int, *, is_declared: bool) -> tuple[bytes, tuple[int, ...]]:
    """Return a request whose body is over the limit, and the statuses that may refuse it.

    A declared length is refused with 413 at once. A chunked body is refused when it has passed the
    limit, or with 408 when a busy server has not received that much in the time that a body may
    take.
    """
    body = b'{"prompt": "' + b"a" * max_body_bytes * 3
    if is_declared:
        return post(COMPLETIONS, body, connection="keep-alive"), (413,)
    chunks = b"".join(
        b"4000\r\n" + body[start : start + 0x4000] + b"\r\n"
        for start in range(0, len(body) - 0x4000, 0x4000)
    )
    headers = {"host": HOST_HEADER, "transfer-encoding": "chunked"}
    return head(f"POST {COMPLETIONS} HTTP/1.1", headers) + chunks, (413, 408)
