"""Many connections at once: batched, each with its own answer, limited, and without leaks."""

import gc
import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.support.serving import (
    MODEL,
    RunningServer,
    join_choices,
    loader,
    read_error,
    read_events,
    run_threads,
    wait_until,
)

PROMPTS = [
    f"{word} {number}" for number in range(8) for word in ("the", "a cat", "in the end", "who")
]


class Watch:
    """Watches a server's metrics; `most` is the largest sum of the named ones that was seen."""

    def __init__(self, server: RunningServer, *names: str) -> None:
        self.most = 0.0
        self._server = server
        self._names = names
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(0.005):
            now = self._server.samples()
            self.most = max(self.most, sum(now[name] for name in self._names))


def test_32_streams_at_once_are_batched_and_each_gets_its_own_answer(
    server: RunningServer, slow_server: RunningServer
) -> None:
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}

    def stream(prompt: str) -> str:
        with httpx.Client(base_url=slow_server.url, timeout=30) as http:
            response = http.post(
                "/v1/completions", json={"prompt": prompt, "stream": True, **settings}
            )
        return join_choices(read_events(response.content))[0].text

    alone = [server.complete(prompt, **settings)["choices"][0]["text"] for prompt in PROMPTS]
    steps_before = slow_server.samples()["iteration_tokens_total_count"]
    with Watch(slow_server, "num_requests_running") as running:
        together = run_threads([partial(stream, prompt) for prompt in PROMPTS])
    assert together == alone
    assert running.most > 16
    steps = slow_server.samples()["iteration_tokens_total_count"] - steps_before
    assert steps < 32 * 40 / 4, "the streams ran one after the other"
    wait_until(slow_server.is_idle)


def test_the_official_client_from_many_threads(server: RunningServer, client: OpenAI) -> None:
    def ask(prompt: str) -> str:
        return (
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
            .choices[0]
            .text
        )

    assert run_threads([partial(ask, prompt) for prompt in PROMPTS[:12]]) == [
        ask(prompt) for prompt in PROMPTS[:12]
    ]


@pytest.fixture(scope="module")
def small(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server that takes 8 unfinished answers and runs 4 of them at once, for seconds."""
    with RunningServer(
        loader(tiny_model, step_s=0.02, max_num_seqs=4), max_queued_requests=8
    ) as running:
        yield running


def test_a_burst_over_the_limit_is_refused_and_those_within_it_are_answered(
    small: RunningServer,
) -> None:
    body = {"prompt": "the", "max_tokens": 30, "ignore_eos": True}
    with Watch(small, "num_requests_running", "num_requests_waiting") as unfinished:
        responses = run_threads(
            [lambda: httpx.post(f"{small.url}/v1/completions", json=body, timeout=30)] * 40
        )
    assert Counter(response.status_code for response in responses) == {200: 8, 429: 32}
    assert unfinished.most == 8
    for response in responses:
        if response.status_code == 429:
            error = read_error(response, 429)
            assert error["type"] == "RateLimitError"
            assert "8" in error["message"]
            assert int(response.headers["retry-after"]) >= 1
    wait_until(small.is_idle)
    assert len(small.complete("the", n=8, max_tokens=1)["choices"]) == 8


def test_every_answer_of_a_request_counts_and_none_is_taken_without_the_others(
    small: RunningServer,
) -> None:
    body = {"max_tokens": 25, "ignore_eos": True}
    holding = threading.Thread(target=lambda: small.complete(["the", "a"], n=3, **body))
    holding.start()
    wait_until(
        lambda: (
            sum(small.samples()[name] for name in ("num_requests_running", "num_requests_waiting"))
            == 6
        )
    )
    assert "6 unfinished requests" in small.error({"prompt": "the", "n": 3, **body}, 429)["message"]
    assert (
        "6 unfinished requests"
        in small.error({"prompt": ["a", "b", "c"], "stream": True, **body}, 429)["message"]
    )
    assert len(small.complete("the", n=2, max_tokens=1)["choices"]) == 2
    assert "9 choices" in small.error({"prompt": "the", "n": 9}, 400)["message"]
    holding.join()
    assert len(small.complete(["a", "b"], n=4, max_tokens=1)["choices"]) == 8


def test_refused_requests_do_not_hold_up_those_that_run(small: RunningServer) -> None:
    """A queue that is full says so before it has read the prompt."""
    holding = threading.Thread(
        target=lambda: small.complete("the", n=8, max_tokens=30, ignore_eos=True)
    )
    holding.start()
    wait_until(lambda: small.samples()["num_requests_waiting"] > 0)
    assert small.error({"prompt": "", "n": 2}, 400)["param"] == "prompt"
    small.error({"prompt": "the " * 100_000}, 429)
    holding.join()


def test_the_official_client_tries_again_when_it_is_told_to(small: RunningServer) -> None:
    holding = threading.Thread(
        target=lambda: small.complete("the", n=8, max_tokens=20, ignore_eos=True)
    )
    holding.start()
    wait_until(lambda: small.samples()["num_requests_waiting"] > 0)
    with (
        OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model=MODEL, prompt="the", n=8)
    with OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=3) as client:
        assert len(client.completions.create(model=MODEL, prompt="the", max_tokens=1).choices) == 1
    holding.join()


def test_long_prompts_and_a_small_cache_change_no_answer(tiny_model: Path) -> None:
    """Prompts are read in chunks beside others' answers; 16 sequences share the cache of two."""
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    jobs = [[i % 200 + 1] * (90 if i % 5 == 4 else 3) for i in range(16)]
    with RunningServer(
        loader(tiny_model, num_blocks=14, max_num_seqs=8, max_num_batched_tokens=32)
    ) as running:
        alone = [running.complete(job, **settings)["choices"][0]["text"] for job in jobs]
        together = running.complete(jobs, **settings)
        assert [choice["text"] for choice in together["choices"]] == alone
        assert running.samples()["num_preemptions_total"] > 0
        assert running.is_idle()


@pytest.fixture
def no_log() -> Iterator[None]:
    """No log records, which pytest would keep until the end of the test."""
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_log")
def test_memory_stays_flat_over_hundreds_of_requests(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model)) as running:

        def traffic(rounds: int) -> None:
            for number in range(rounds):
                running.complete(f"number {number}", max_tokens=4, logprobs=2, n=2)
                running.stream([f"stream {number}", "x"], max_tokens=4, echo=True)
                running.complete("the", max_tokens=4, allowed_token_ids=[1], stop='"')
                running.post({"prompt": f"{number}", "max_tokens": 0})
                running.post({"prompt": f"{number}" * 200})
                with running.http.stream(
                    "POST",
                    "/v1/completions",
                    json={"prompt": f"left {number}", "stream": True, "max_tokens": 100},
                ):
                    pass  # closed before the end
            wait_until(running.is_idle)
            gc.collect()

        traffic(10)
        before = sys.getallocatedblocks()
        traffic(50)
        left = sys.getallocatedblocks() - before
    assert left < 300 * 5, (
        f"300 requests left {left} blocks of memory behind; one that is forgotten has dozens"
    )


def test_metrics_and_health_answer_while_the_engine_works(slow_server: RunningServer) -> None:
    working = threading.Thread(
        target=lambda: slow_server.complete(PROMPTS, max_tokens=100, ignore_eos=True)
    )
    working.start()
    answers = 0
    while working.is_alive():
        assert slow_server.http.get("/health").status_code == 200
        answers += 1
    working.join()
    assert answers >= 3, "it waited for the engine"
