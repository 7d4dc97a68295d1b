"""A short soak, and each condition of its verdict."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.load import server_soak
from tests.load.ledger import (
    ANSWERED,
    Ledger,
    WrongAnswerError,
    check_error,
    essence,
    must_be_whole,
    read_refusal,
)
from tests.load.requests import COMPLETIONS, Ask, oversized_request
from tests.load.verdict import judge, table
from tests.load.watch import Sample, Watch, gauge
from tests.load.wire import Answer, parse

SOAK_MINUTES = 1 / 8


@pytest.mark.slow(30)
def test_a_server_stands_a_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a short soak. It does not judge times, which a busy machine makes longer."""
    report = tmp_path / "soak.json"
    code = server_soak.main(
        [
            "--minutes",
            str(SOAK_MINUTES),
            "--clients",
            "96",
            "--max-health-s",
            "30",
            "--speculative-config",
            '{"model": "tiny-books-draft", "method": "ngram"}',
            "--json",
            str(report),
        ]
    )
    verdict = json.loads(report.read_text(encoding="utf-8"))
    failed = [
        condition
        for condition in verdict["conditions"]
        if not condition[1] and condition[0] != "memory is flat"
    ]
    assert not failed, capsys.readouterr().out
    growth = verdict["rss"]["growth"]
    assert growth is None or growth <= 0.25, verdict[
        "rss"
    ]  # the caches of a server are still filling in its first minute
    assert code == int(not verdict["held"])
    for kind in (
        "malformed",
        "oversized",
        "dripping",
        "left in the middle",
        "stalled reader, stream",
        "slow reader",
        "greedy",
        "seeded, stream",
    ):
        assert verdict["fates"][kind]


def sample(at_s: float, mib: float, **changes: Any) -> Sample:
    taken = Sample(at_s, round(mib * 2**20), 0.0, 0.0, 0.0, 3.0, 1000.0, at_s, at_s / 2)
    return replace(taken, **changes)


def good() -> dict[str, Any]:
    """What `judge` takes, of a soak in which all went well."""
    ledger = Ledger(checked=5)
    ledger.fates["greedy", ANSWERED] = 5
    ledger.fates["greedy", "refused 429"] = 2
    watch = Watch(0, 0, [sample(at, 90 if at < 60 else 100) for at in range(600)], [0.01] * 100)
    end = {"exit_code": 0, "integrity": "clean", "tracebacks": 0, "last_streams": (4, 4)}
    return {
        "ledger": ledger,
        "watch": watch,
        "idle": sample(610, 100),
        "files": (9, 9),
        "refilled": True,
        "end": end,
        "max_health_s": 1.0,
        "must_draft": True,
    }


def test_a_good_soak_holds() -> None:
    verdict = judge(**good())
    assert verdict["held"], verdict
    assert (verdict["requests"], verdict["answered"], verdict["refused"]) == (7, 5, 2)
    assert (verdict["drafted_tokens"], verdict["accepted_tokens"]) == (610, 305)
    assert "ok    memory is flat" in table(verdict)
    json.dumps(verdict, allow_nan=False)


def fail_one(found: dict[str, Any]) -> None:
    with found["ledger"].request("greedy"):
        raise WrongAnswerError("other bits")


def grow(found: dict[str, Any]) -> None:
    found["watch"].samples[-20:] = [sample(580 + at, 106) for at in range(20)]


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "every request": fail_one,
    "there was more": lambda found: found["ledger"].fates.pop(("greedy", "refused 429")),
    "greedy and seeded": lambda found: setattr(found["ledger"], "checked", 0),
    "nothing runs": lambda found: found.update(idle=sample(610, 100, waiting=1.0)),
    "every place": lambda found: found.update(refilled=False),
    "memory": grow,
    "no connection": lambda found: found.update(files=(9, 30)),
    "/health": lambda found: found["watch"].health_s.append(1.5),
    "streams": lambda found: found["end"].update(last_streams=(3, 4)),
    "the process": lambda found: found["end"].update(exit_code=1),
    "check_integrity": lambda found: found["end"].update(integrity="broken: block 7"),
    "drafted tokens": lambda found: found.update(idle=sample(610, 100, drafted_tokens=0.0)),
    "the log": lambda found: found["end"].update(tracebacks=1),
}


@pytest.mark.parametrize("name", SPOILED)
def test_each_condition_can_fail(name: str) -> None:
    found = good()
    SPOILED[name](found)
    verdict = judge(**found)
    assert not verdict["held"]
    assert [
        condition[0].startswith(name) for condition in verdict["conditions"] if not condition[1]
    ] == [True]
    assert "FAIL" in table(verdict)


def test_memory_may_be_unknown() -> None:
    found = good()
    found["watch"].samples = [replace(one, rss_bytes=None) for one in found["watch"].samples]
    assert judge(**found)["held"]


def test_broken_responses_are_detected() -> None:
    assert parse(b"") is None
    assert parse(b"\x16\x03\x01\r\n\r\n") is None
    assert parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab") == Answer(
        200, {"content-length": "2"}, b"ab", True
    )
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
    found = parse(whole)
    assert found is not None
    assert (found.body, found.is_whole) == (b"abcd", True)
    for cut in (5, 8, 12):
        with pytest.raises(WrongAnswerError, match="broken off"):
            must_be_whole(parse(whole[:-cut]))
    with pytest.raises(WrongAnswerError, match="without an answer"):
        must_be_whole(None)


def test_a_refusal_must_have_its_form() -> None:
    error = {"error": {"message": "full", "type": "RateLimitError", "param": None, "code": 429}}
    refusal = Answer(429, {"retry-after": "1"}, json.dumps(error).encode(), True)
    assert read_refusal(refusal) == "refused 429"
    with pytest.raises(WrongAnswerError, match="retry-after"):
        read_refusal(replace(refusal, headers={}))
    with pytest.raises(WrongAnswerError, match="status 500"):
        read_refusal(replace(refusal, status=500))
    with pytest.raises(WrongAnswerError, match="instead of"):
        check_error(refusal, 400)
    with pytest.raises(WrongAnswerError, match="bytes"):
        check_error(replace(refusal, body=refusal.body + b" " * 9000), 429)


def test_a_stream_and_a_whole_answer_have_one_essence() -> None:
    ask = Ask("greedy", COMPLETIONS, {"prompt": "a"})
    usage = {"prompt_tokens": 1, "completion_tokens": 2}

    def choice(text: str, lp: float, reason: str | None) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text,
            "logprobs": {"token_logprobs": [lp]},
            "token_ids": [7],
            "finish_reason": reason,
            "stop_reason": None,
        }

    pieces = [
        {"choices": [choice("a", -1.0, None)]},
        {"choices": [choice("b", -2.0, "length")]},
        {"choices": [], "usage": usage},
    ]
    stream = (
        b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces)
        + b"data: [DONE]\n\n"
    )
    whole = {
        "choices": [
            {
                **choice("ab", 0, "length"),
                "logprobs": {"token_logprobs": [-1.0, -2.0]},
                "token_ids": [7, 7],
            }
        ],
        "usage": usage,
    }
    assert essence(ask, stream, streamed=True) == essence(
        ask, json.dumps(whole).encode(), streamed=False
    )
    assert essence(ask, b"\n\n" * 2 + stream, streamed=True) == essence(ask, stream, streamed=True)
    with pytest.raises(WrongAnswerError, match="without its end"):
        essence(ask, stream[:-20], streamed=True)
    with pytest.raises(WrongAnswerError, match="an error"):
        essence(ask, b'data: {"error": {}}\n\ndata: [DONE]\n\n', streamed=True)


def test_metrics_are_read_by_their_names() -> None:
    page = (
        'nanovllm:num_requests_running{model_name="x"} 3.0\n'
        'nanovllm:num_requests_running_total{model_name="x"} 9.0\n'
    )
    assert gauge(page, "num_requests_running") == 3
    with pytest.raises(RuntimeError, match="has no waiting"):
        gauge(page, "waiting")


def test_interim_answers_are_skipped() -> None:
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    answer = parse(b"HTTP/1.1 102 Processing\r\n\r\n" * 2 + whole)
    assert answer is not None
    assert (answer.status, answer.body, answer.is_whole) == (200, b"ok", True)
    assert parse(b"HTTP/1.1 102 Processing\r\n\r\n") is None


def test_only_a_chunked_oversized_body_may_be_refused_as_slow() -> None:
    declared, statuses = oversized_request(1 << 15, is_declared=True)
    assert b"content-length" in declared
    assert statuses == (413,)
    chunked, statuses = oversized_request(1 << 15, is_declared=False)
    assert b"transfer-encoding: chunked" in chunked
    assert len(chunked) > 1 << 15
    assert statuses == (413, 408)
