"""Grammars that would crash or block the server get a 400, and other requests notice nothing."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.engine.engine import Engine
from nanovllm.engine.grammar import worker
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.grammar.limits import GrammarLimits
from tests.support.grammars import AMBIGUOUS, DEEP_RULES, ENDLESS_MULTIPLE
from tests.support.serving import TIMEOUT_S, RunningServer, loader, read_error, wait_until

LATE_AMBIGUOUS = {
    "grammar": str(AMBIGUOUS["grammar"]).replace("start: s\n", 'start: "a" s\n')
}  # only its second mask takes long


def is_compiling(server: RunningServer) -> bool:
    return server.engine.engine.input_processor.grammars.is_compiling


@pytest.fixture(scope="module")
def limited(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server whose grammars may take little."""
    load = loader(tiny_model)

    def with_limits() -> Engine:
        engine = load()
        limits = GrammarLimits(memory_bytes=64 << 20, mask_cpu_s=0.1)
        engine.input_processor.grammars = Grammars(
            engine.tokenizer, engine.model.vocab, engine.model.eos_token_ids, limits
        )
        return engine

    with RunningServer(with_limits) as running:
        yield running


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("fields", [DEEP_RULES, {"json": {"multipleOf": 0}}, {"regex": "("}])
def test_a_grammar_that_cannot_be_compiled_is_a_400(
    limited: RunningServer, fields: dict[str, Any], *, streams: bool
) -> None:
    body = {"prompt": "the", "structured_outputs": fields, "stream": streams}
    error = read_error(limited.post(body), 400)
    assert error["param"] == "structured_outputs"
    assert limited.complete(max_tokens=2, structured_outputs={"regex": "ab"})
    assert limited.is_idle()


def test_a_response_format_is_blamed_by_its_name(limited: RunningServer) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": {"multipleOf": 0}}}
    error = limited.error({"prompt": "the", "response_format": wanted})
    assert error["param"] == "response_format"


def test_a_mask_over_its_budget_is_a_400_and_an_event(limited: RunningServer) -> None:
    wanted = {"structured_outputs": LATE_AMBIGUOUS, "max_tokens": 5}
    assert limited.error({"prompt": "the", **wanted})["param"] == "structured_outputs"
    *_, last = limited.stream(**wanted)
    assert last["error"]["code"] == 400
    assert limited.is_idle()


def test_a_deadline_holds_while_a_grammar_is_compiled(limited: RunningServer) -> None:
    body = {"prompt": "the", "structured_outputs": ENDLESS_MULTIPLE}
    error = limited.error(body, 503, **{"x-request-timeout-s": "0.2"})
    assert "0.2 s" in error["message"]
    wait_until(lambda: not is_compiling(limited))


def test_a_client_that_leaves_ends_the_compilation(limited: RunningServer) -> None:
    body = {"prompt": "the", "structured_outputs": {"json": {"multipleOf": 99999931}}}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
        client.post(f"{limited.url}/v1/completions", json=body)
    wait_until(lambda: not is_compiling(limited))


def test_a_compilation_that_nobody_needs_ends_in_an_idle_engine(
    limited: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"prompt": "the", "structured_outputs": {"json": {"multipleOf": 99999847}}})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(worker, "LATE_S", 1000.0)  # it is not late when its client leaves
        with socket.create_connection(("127.0.0.1", limited.port), timeout=30) as client:
            client.sendall((head + body).encode())
            wait_until(lambda: is_compiling(limited))
        wait_until(limited.is_idle)
    wait_until(lambda: not is_compiling(limited))


def test_stopping_ends_a_compilation(tiny_model: Path) -> None:
    answers: list[httpx.Response] = []
    with RunningServer(loader(tiny_model)) as running:

        def ask() -> None:
            body = {"prompt": "the", "structured_outputs": ENDLESS_MULTIPLE}
            answers.append(running.post(body))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: is_compiling(running))
        running.on_loop(running.engine.stop)
        asking.join(TIMEOUT_S)
        assert not asking.is_alive()
        assert "stopped" in read_error(answers[0], 503)["message"]


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens": 100_000}, {"prompt": ["the", "the " * 2000]}],
    ids=["length", "second"],
)
def test_refused_requests_leave_no_grammars_to_compile(
    limited: RunningServer, changes: dict[str, Any]
) -> None:
    grammars = limited.engine.engine.input_processor.grammars
    for number in range(40):
        schema = {"multipleOf": 99_999_701 + 2 * number}
        limited.error({"prompt": "the", "structured_outputs": {"json": schema}, **changes})
    wait_until(lambda: not is_compiling(limited) and not grammars.is_full)
    assert limited.complete(max_tokens=2, structured_outputs={"regex": "a[bc]"})
