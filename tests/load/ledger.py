"""The fate of every request of a soak, and checks of the responses."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.options import tell
from tests.load.requests import EMBEDDINGS, Ask
from tests.load.wire import Answer

ANSWERED, LEFT, CUT, FAILED = "answered", "left", "cut", "failed"
"""Fates beside `refused 429` etc.: LEFT by the client, CUT by the server after a stall."""

MAX_FAILURES = 20
_MAX_REFUSAL_BYTES = 8192  # an error must not be many times larger than what provoked it


class WrongAnswerError(Exception):
    """A response that violates the API's promises."""


@dataclass(slots=True)
class Ledger:
    """Counts of requests by kind and fate.

    Attributes:
        open: requests without a fate yet.
        checked: responses that were bit-identical to the known output.
    """

    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    open: int = 0
    checked: int = 0
    generated_tokens: int = 0

    @contextmanager
    def request(self, kind: str) -> Iterator["Entry"]:
        """Open a request and record its fate at the end; errors are failures."""
        self.open += 1
        entry = Entry()
        try:
            yield entry
        except (OSError, WrongAnswerError, ValueError, KeyError, TypeError) as error:
            entry.fate = FAILED
            if len(self.failures) < MAX_FAILURES:
                self.failures.append(f"{kind}: {type(error).__name__}: {str(error)[:500]}")
                tell(self.failures[-1])
        finally:
            self.open -= 1
            self.fates[kind, entry.fate] += 1

    def count(self, fate: str) -> int:
        """Return the number of requests with a fate; `refused` matches all refusals."""
        return sum(
            number
            for (_, counted_fate), number in self.fates.items()
            if counted_fate == fate or counted_fate.startswith(f"{fate} ")
        )

    @property
    def total(self) -> int:
        """Return the number of requests with a fate."""
        return sum(self.fates.values())


@dataclass(slots=True)
class Entry:
    """The fate of one request; failed until it is known."""

    fate: str = FAILED


def read_refusal(answer: Answer) -> str | None:
    """Return the fate of a refused request, None for 200; raises WrongAnswerError."""
    if answer.status == 200:
        return None
    if answer.status in (429, 503):
        if "retry-after" not in answer.headers:
            raise WrongAnswerError(f"{answer.status} without retry-after")
        check_error(answer, answer.status)
        return f"refused {answer.status}"
    raise WrongAnswerError(f"status {answer.status}: {answer.body[:300]!r}")


def check_error(answer: Answer | None, *statuses: int) -> None:
    """Check an error's status, format and size; raises WrongAnswerError."""
    whole = must_be_whole(answer)
    if whole.status not in statuses:
        raise WrongAnswerError(f"status {whole.status} instead of {statuses}: {whole.body[:300]!r}")
    if len(whole.body) > _MAX_REFUSAL_BYTES:
        raise WrongAnswerError(f"an error of {len(whole.body)} bytes")
    error = json.loads(whole.body)["error"]
    if (
        error.keys() != {"message", "type", "param", "code"}
        or error["code"] != whole.status
        or not error["message"]
    ):
        raise WrongAnswerError(f"an error in another form: {whole.body[:300]!r}")


def must_be_whole(answer: Answer | None) -> Answer:
    """Return a complete response; raises WrongAnswerError."""
    if answer is None:
        raise WrongAnswerError("the connection ended without an answer")
    if not answer.is_whole:
        raise WrongAnswerError(
            f"status {answer.status}, broken off after {len(answer.body)} bytes: "
            f"{answer.body[-200:]!r}"
        )
    return answer


def essence(ask: Ask, body: bytes, *, streamed: bool) -> dict[str, Any]:
    """Return what must be bit-identical under any load: texts, ids, log-probabilities, usage."""
    if ask.path == EMBEDDINGS:
        whole = json.loads(body)
        return {"data": whole["data"], "tokens": whole["usage"]["total_tokens"]}
    bodies = list(read_events(body)) if streamed else [json.loads(body)]
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for one in bodies for choice in one["choices"]):
        known = choices.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": {}})
        if known.get("finish_reason") is not None:
            raise WrongAnswerError("a piece of an answer came after its end")
        known["text"] += choice["text"]
        known["token_ids"] += choice.get("token_ids") or []
        for name, values in (choice["logprobs"] or {}).items():
            known["logprobs"][name] = known["logprobs"].get(name, []) + values
        known |= {name: choice[name] for name in ("finish_reason", "stop_reason")}
    usage = bodies[-1]["usage"]
    return {"choices": choices, "tokens": (usage["prompt_tokens"], usage["completion_tokens"])}


def first_difference(expected: Any, actual: Any, path: str = "") -> str:
    """Return the first difference of two essences."""
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        return next(
            (
                first_difference(expected[key], actual[key], f"{path}.{key}")
                for key in expected
                if expected[key] != actual[key]
            ),
            path,
        )
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = enumerate(zip(expected, actual, strict=True))
        return next(
            (
                first_difference(one, other, f"{path}[{index}]")
                for index, (one, other) in pairs
                if one != other
            ),
            path,
        )
    return f"{path}: {str(expected)[:150]} alone, {str(actual)[:150]} under load"


def read_events(body: bytes) -> Iterator[dict[str, Any]]:
    """Yield the JSON of a complete stream's events; raises WrongAnswerError.

    Blank lines, which keep the connection of a queued request alive, are skipped.
    """
    *events, rest = body.split(b"\n\n")
    if rest or not events or events[-1] != b"data: [DONE]":
        raise WrongAnswerError(f"a stream without its end: {body[-200:]!r}")
    for event in events[:-1]:
        if not event:
            continue
        event_body = json.loads(event.removeprefix(b"data: "))
        if "error" in event_body:
            raise WrongAnswerError(f"an error in a stream: {event_body['error']}")
        yield event_body


def check_shape(ask: Ask, actual: dict[str, Any]) -> None:
    """Check the number of choices and their finish reasons; raises WrongAnswerError."""
    num_choices = ask.body.get("n", 1)
    reasons = [choice.get("finish_reason") for choice in actual["choices"].values()]
    if len(reasons) != num_choices or not set(reasons) <= {"stop", "length"}:
        raise WrongAnswerError(f"expected {num_choices} choices, got finish reasons {reasons}")
