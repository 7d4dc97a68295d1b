"""A short, seeded run of `make fuzz`: schemathesis finds no fault and no undocumented answer."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import RunningServer, loader, wait_until

pytest.importorskip("schemathesis")

from tests.support.fuzzing import fuzz, fuzzed_server, narrowed

MINUTES_S = 480.0  # a busy machine may take its time


@pytest.fixture(scope="module")
def fuzzed(tiny_model: Path) -> Iterator[RunningServer]:
    """The server of `make fuzz`."""
    with fuzzed_server(tiny_model) as running:
        yield running


@pytest.mark.slow(40)
def test_nothing_that_is_sent_gets_a_fault_or_an_answer_that_is_not_documented(
    fuzzed: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    document = narrowed(fuzzed)
    code, printed = fuzz(
        fuzzed,
        document,
        ["--phases", "coverage,fuzzing", "--seed", "1", "--max-examples", "2"],
        timeout_s=MINUTES_S,
    )
    assert code == 0, printed
    assert "Tested: 27" in printed
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
    wait_until(fuzzed.is_idle)


def test_the_fuzzer_finds_what_is_wrong(tiny_model: Path, fuzzed: RunningServer) -> None:
    """A server without a key, under a document that asks for one and describes a wrong answer."""
    document = narrowed(fuzzed)
    document["components"]["schemas"]["Version"]["required"].append("date")
    options = [
        "--phases",
        "coverage",
        "--seed",
        "1",
        "--include-path",
        "/version",
        "--continue-on-failure",
    ]
    with RunningServer(loader(tiny_model)) as careless:
        code, printed = fuzz(careless, document, options, timeout_s=MINUTES_S)
    assert code == 1, printed
    for finding in ('"date" is a required property', "kept_contract", "uthentication"):
        assert finding in printed
