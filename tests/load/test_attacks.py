"""The attacks are well-formed and end, and each condition of their table can fail."""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nanovllm.model.families.registry import load_config
from tests.load import attack_server as program
from tests.load import payloads, requests, watch
from tests.load.attack import Attack, Target, ask, flood, outcome_of
from tests.load.attacks import ATTACKS, FOR_ANY_SERVER, take_turns
from tests.load.bystanders import OK, Session, Stopwatch
from tests.load.dialogues import half_close, rest
from tests.load.ledger import WrongAnswerError
from tests.load.verdict import Seen, attack_conditions
from tests.load.wire import Answer

REQUESTS: dict[str, Callable[[int], bytes | list[bytes]]] = {
    "chained_rules": payloads.chained_rules,
    "chained_terminals": payloads.chained_terminals,
    "multiple_of": lambda number: payloads.multiple_of(9999991, number),
    "product_of_multiples": payloads.product_of_multiples,
    "ambiguous_grammar": lambda number: payloads.ambiguous_grammar(number, n=8),
    "bad_words": payloads.bad_words,
    "log_probabilities": payloads.log_probabilities,
    "scored_prompts": payloads.scored_prompts,
    "structural_bodies": payloads.structural_bodies,
    "long_stops": payloads.long_stops,
    "urgent": payloads.urgent,
    "same_request_id": payloads.same_request_id,
    "texts": payloads.texts,
    "growing texts": payloads.growing_texts,
    "long bad words": payloads.long_bad_words,
    "many token ids": payloads.many_token_ids,
    "unwritable metadata": payloads.unwritable_metadata,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_whole_and_of_legal_size(name: str) -> None:
    """What is to be attacked lies behind the parser and the limit of a body."""
    made = REQUESTS[name](3)
    for request in [made] if isinstance(made, bytes) else made:
        head, _, body = request.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/")
        assert f"content-length: {len(body)}".encode() in head
        assert len(body) <= 4 << 20
        json.loads(body)


def test_wrong_requests_are_http_with_bodies() -> None:
    for request in [*payloads.wrong_requests(0), *payloads.wrong_chats(0)]:
        head, _, body = request.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert body.startswith(b"{")


def test_attacks_on_special_servers_are_not_mixed_into_other_loads() -> None:
    assert {"bad-words", "half-close"} <= set(FOR_ANY_SERVER)
    special = {
        *("none", "open-files", "special-tokens", "sigterm-masks", "left-with-a-byte"),
        *("sigterm-bodies", "ninety-bodies", "many-token-ids", "fair-share"),
    }
    assert not special & set(FOR_ANY_SERVER)


def test_a_half_closed_request_waits_as_long_as_other_clients() -> None:
    """In an attack's last moment: unanswered on an idle server, awaited beside a load."""

    async def run(patience_s: float) -> dict[str, int]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            target = Target(server.sockets[0].getsockname()[1], time.monotonic(), patience_s)
            return dict(await half_close(target))

    assert asyncio.run(run(0.0)) == {"unanswered": 5}
    assert asyncio.run(run(60.0)) == {"200": 1}


@pytest.mark.parametrize("name", [name for name in ATTACKS if ATTACKS[name].prepare is not None])
def test_prepared_models_differ_from_the_bundled_one_in_one_file(name: str, tmp_path: Path) -> None:
    prepare = ATTACKS[name].prepare
    assert prepare is not None
    path = Path(prepare(tmp_path)[-1])
    if path.is_dir():
        assert load_config(path).vocab == requests.VOCAB
    else:
        assert path.read_text(encoding="utf-8") == payloads.SPECIAL_TOKEN_TEMPLATE


def test_an_answer_becomes_an_outcome() -> None:
    error = {"error": {"message": "full", "type": "x", "param": None, "code": 429}}
    assert outcome_of(Answer(200, {}, b"", True)) == "200"
    assert outcome_of(Answer(429, {}, json.dumps(error).encode(), True)) == "429"
    assert outcome_of(Answer(500, {}, b"Internal Server Error", True)) == "500 in another form"


def test_an_attack_ends_in_time() -> None:
    """On a server that takes connections and answers nothing, and on none at all."""

    async def attack() -> tuple[float, dict[str, dict[str, int]], str]:
        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(ignore, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        started_s = time.monotonic()
        outcomes = await take_turns(["multiple-of", "two-lengths", "half-close"], port, 0.6)
        took_s = time.monotonic() - started_s
        server.close()
        await server.wait_closed()
        return took_s, outcomes, await ask(Target(port, time.monotonic() + 5), b"GET /")

    took_s, outcomes, gone = asyncio.run(attack())
    assert took_s < 10
    assert outcomes["multiple-of"] == {"no answer": 1}
    assert gone == "closed"


def test_a_flood_changes_its_requests_and_ends_with_its_rounds() -> None:
    numbers: list[int] = []

    def request(number: int) -> bytes:
        numbers.append(number)
        return b""

    async def run() -> dict[str, int]:
        server = await asyncio.start_server(_close, "127.0.0.1", 0)
        target = Target(server.sockets[0].getsockname()[1], time.monotonic() + 20)
        outcomes = await flood(request, rounds=3, copies=2)(target)
        server.close()
        return dict(outcomes)

    assert asyncio.run(run()) == {"closed": 6}
    assert numbers == list(range(6))


async def _close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


def test_a_stopwatch_counts_the_wait_that_goes_on() -> None:
    watch = Stopwatch()
    watch.start()
    time.sleep(0.02)
    assert watch.read() >= 0.02
    watch.lap()
    watch.stop()
    longest_s = watch.read()
    time.sleep(0.01)
    assert watch.read() == longest_s >= 0.02


def test_an_incomplete_response_is_not_retried() -> None:
    """A connection that was closed for being idle is; the first answer keeps it open."""
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in (whole, whole[:-1]):
            asked.append(await reader.read(100))
            writer.write(part)
            await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with aclosing(Session(server.sockets[0].getsockname()[1])) as session:
            assert (await session.ask(b"one", Stopwatch())).body == b"ok"
            with pytest.raises(WrongAnswerError, match="within an answer"):
                await session.ask(b"two", Stopwatch())
        server.close()

    asyncio.run(run())
    assert asked == [b"one", b"two"]


FLAGS = program.parse_flags([])
ATTACK = Attack("any", "", rest)


def good_row() -> dict[str, Any]:
    """The figures of a server that holds."""
    return {
        "name": "any", "outcomes": {"400": 3}, "stream_ms": 20.0, "health_ms": 5.0,
        "completion_ms": 9.0, "own_delay_ms": 2.0, "bystanders": {OK: 100}, "before_mib": 180,
        "peak_mib": 200, "after_mib": 185, "log_mb": 0.1, "alive": "yes",
        "log_is_clean": True, "exit_code": 0, "exit_s": 0.5, "integrity": "clean",
    }  # fmt: skip


SPOILED: dict[str, dict[str, Any]] = {
    "stream_ms over 100": {"stream_ms": 150.0},
    "health_ms over 100": {"health_ms": 150.0},
    "completion_ms over 100": {"completion_ms": 150.0},
    "peak_mib grew": {"peak_mib": 2000},
    "after_mib grew": {"after_mib": 1000},
    "outcomes": {"outcomes": {"400": 3, "500": 1}},
    "the server died": {"alive": "no"},
    "answers lost": {"bystanders": {OK: 100, "lost": 1}},
    "other bits": {"bystanders": {OK: 100, "other bits": 1}},
    "bystanders got errors": {"bystanders": {OK: 100, "status 500": 1}},
    "bystanders were refused": {"bystanders": {OK: 100, "refused": 1}},
    "log grew": {"log_mb": 80.0},
    "log forged": {"log_is_clean": False},
    "exit code": {"exit_code": -9},
    "slow exit": {"exit_s": 25.0},
    "integrity": {"integrity": "broken: block 7"},
}


def test_a_good_row_holds() -> None:
    assert program.faults(good_row(), ATTACK, FLAGS) == []
    row = {**good_row(), "faults": []}
    assert "ok" in program.shown(row)


def test_waits_are_judged_beside_those_of_an_idle_server() -> None:
    row = {**good_row(), "health_ms": 180.0}
    assert program.faults(row, ATTACK, FLAGS) == ["health_ms over 100"]
    assert program.faults(row, ATTACK, FLAGS, {"health_ms": 90.0}) == []


@pytest.mark.parametrize("fault", SPOILED)
def test_each_fault_is_seen(fault: str) -> None:
    row = {**good_row(), **SPOILED[fault]}
    row["faults"] = program.faults(row, ATTACK, FLAGS)
    assert row["faults"] == [fault]
    assert f"FAIL: {fault}" in program.shown(row)


def test_waits_are_forgiven_where_the_machine_is_to_blame() -> None:
    row = {**good_row(), "stream_ms": 150.0, "own_delay_ms": 60.0}
    assert program.faults(row, ATTACK, FLAGS) == []


@pytest.mark.parametrize(
    ("name", "wait_ms", "fault"),
    [
        ("gap_ms", 700.0, "gap_ms over 500"),
        ("stream_ms", 2500.0, "stream_ms over 2000"),
        ("completion_ms", 2500.0, "completion_ms over 2000"),
    ],
)
def test_equal_shares_have_limits_of_their_own(name: str, wait_ms: float, fault: str) -> None:
    attack = ATTACKS["fair-share"]
    row = {**good_row(), "gap_ms": 400.0, "stream_ms": 1900.0, "outcomes": {"200": 1}}
    assert program.faults(row, attack, FLAGS) == []
    assert program.faults({**row, name: wait_ms}, attack, FLAGS) == [fault]
    head = payloads.scored_prompts(0, prompts=1).partition(b"\r\n\r\n")[0].decode()
    assert f"authorization: Bearer {payloads.ATTACKER_KEY}" in head


def test_a_missed_deadline_is_seen() -> None:
    attack = Attack("any", "", rest, deadline_s=3.0)
    late = {**good_row(), "completion_ms": 3500.0}
    assert program.faults(late, attack, FLAGS) == ["deadline missed"]
    assert program.faults({**late, "completion_ms": 3050.0}, attack, FLAGS) == []


def test_a_model_may_be_refused_at_start_only_where_it_is_hostile() -> None:
    row = {"outcomes": {"refused at start": 1}}
    assert program.faults(row, ATTACK, FLAGS) == ["the server did not start"]
    assert program.faults(row, ATTACKS["tokenizer-panic"], FLAGS) == []


def seen(**changes: Any) -> Seen:
    figures = {"bystanders": {OK: 9}, "gap_ms": 10.0, "health_ms": 10.0, "own_delay_ms": 1.0}
    outcomes = {"bad-words": {"400": 5, "429": 2}}
    limits = {"max_health_s": 1.0, "max_pause_s": 1.0}
    return Seen(**{"outcomes": outcomes, "figures": figures, **limits, **changes})


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"figures": {**seen().figures, "bystanders": {OK: 9, "lost": 1}}}),
        (0, {"figures": {**seen().figures, "bystanders": {OK: 9, "other bits": 1}}}),
        (1, {"figures": {**seen().figures, "gap_ms": 1500.0}}),
        (2, {"figures": {**seen().figures, "health_ms": 1500.0}}),
        (3, {"outcomes": {"bad-words": {"500": 1}}}),
        (3, {"outcomes": {}}),
    ],
)
def test_each_condition_of_an_attacked_soak_can_fail(number: int, changes: dict[str, Any]) -> None:
    assert all(held for _, held, _ in attack_conditions(seen()))
    failed = [not held for _, held, _ in attack_conditions(seen(**changes))]
    assert failed == [at == number for at in range(4)]


def test_the_program_attacks_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real server, bystanders and an attacker; how fast it is, is not judged."""
    report = tmp_path / "attacks.json"
    limits = ("--max-pause-ms", "--max-health-ms", "--max-left-mib", "--max-growth-mib")
    lenient = [part for limit in limits for part in (limit, "60000")]
    times = ["--seconds-per-attack", "1", "--settle-s", "0.2"]
    code = program.main(["--only", "wrong-requests", *times, *lenient, "--output", str(report)])
    record = json.loads(report.read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert record == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["bystanders"][OK] > 5
    assert sum(row["outcomes"].values()) >= len(payloads.wrong_requests(0))
    assert (row["alive"], row["exit_code"], row["integrity"]) == ("yes", 0, "clean")
    assert set(row["faults"]) <= {"outcomes"}
    assert code == int(bool(row["faults"]))


def test_limits_of_the_server_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    from benchmarks import server_process

    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: limits.update({kind: both}))
    flags: list[str] = []

    def note(given: list[str]) -> int:
        flags.extend(given)
        return 0

    monkeypatch.setattr(server_process, "main", note)
    assert server_process.serve_and_check(["RLIMIT_NOFILE=64", "--port", "0"]) == 0
    assert flags == ["serve", "--port", "0"]
    assert limits == {resource.RLIMIT_NOFILE: (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1])}


def test_parsed_flags_choose_attacks() -> None:
    assert program.parse_flags(["--only", "bad-words,chunks"]).only == ["bad-words", "chunks"]
    with pytest.raises(SystemExit):
        program.parse_flags(["--only", "no-such"])
    assert isinstance(FLAGS, argparse.Namespace)
    assert FLAGS.only == list(ATTACKS)


def test_a_process_that_ends_while_memory_is_read_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(pid: int) -> int:
        if pid == 2:
            raise FileNotFoundError("/proc/2/statm")
        return 100

    monkeypatch.setattr(watch, "process_tree", lambda pid: [pid, 2, 3])
    monkeypatch.setattr(watch, "resident_bytes", read)
    assert watch.tree_bytes(1) == 200
