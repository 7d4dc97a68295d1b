"""Everything beside completions: models, version, health, the API description, and metrics."""

import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from nanovllm.engine.engine import Engine
from nanovllm.engine.grammar.grammar import SequenceGrammar
from tests.support.serving import MODEL, RunningServer, loader, read_error, wait_until

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
WAITING_BY_REASON = tuple(
    f"num_requests_waiting_by_reason{{reason={reason}}}" for reason in ("capacity", "deferred")
)
COUNTERS = (
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "prompt_tokens_computed_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
)
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
    "request_inference_time_seconds", "request_num_preemptions", "request_params_n",
    "request_params_max_tokens", "request_max_num_generation_tokens",
    "request_prefill_kv_computed_tokens",
)  # fmt: skip


def test_models_lists_the_model_under_each_of_its_names(
    server: RunningServer, client: OpenAI
) -> None:
    body = server.http.get("/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [MODEL, "alias"]
    for model in body["data"]:
        assert model.keys() >= {"id", "object", "created", "owned_by", "root", "max_model_len"}
        assert (model["object"], model["max_model_len"]) == ("model", 128)
        assert model["has_chat_template"] is True, "of the shared server"
        defaults = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        assert model["sampling_defaults"] == defaults
        assert model["has_chat_template"] is True
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]


def test_a_model_is_found_by_each_of_its_names(server: RunningServer, client: OpenAI) -> None:
    listed = server.http.get("/v1/models").json()["data"]
    assert [server.http.get(f"/v1/models/{name}").json() for name in (MODEL, "alias")] == listed
    assert client.models.retrieve("alias").id == "alias"


@pytest.mark.parametrize("name", ["other", "tin", "tiny/alias", "/", "TINY", "x" * 5000, "%ff"])
def test_a_model_that_is_not_served_is_not_found(server: RunningServer, name: str) -> None:
    error = read_error(server.http.get(f"/v1/models/{name}"), 404)
    assert error["type"] == "NotFoundError"
    assert len(error["message"]) < 500


def test_a_models_name_may_have_slashes(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model), model_names=("some/body/s model",)) as running:
        expected = running.http.get("/v1/models").json()["data"][0]
        assert running.http.get("/v1/models/some/body/s model").json() == expected
        assert running.http.get("/v1/models/some%2Fbody%2Fs%20model").json() == expected
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as opened:
            assert opened.models.retrieve("some/body/s model").id == "some/body/s model"


def test_load_counts_what_runs_and_what_waits(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model, step_s=0.02, max_num_seqs=2)) as running:
        limits = {
            "max_queued_requests": 1024,
            "max_queued_tokens": 16 * running.engine.engine.cache_tokens,
        }
        idle = {"server_load": 0, "queued_requests": 0, "queued_tokens": 0, **limits}
        assert running.http.get("/load").json() == idle
        body = {
            "prompt": ["the", "a"],
            "n": 3,
            "stream": True,
            "max_tokens": 100,
            "ignore_eos": True,
        }
        with running.http.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.iter_raw()  # kept: the connection closes with it
            next(chunks)
            wait_until(
                lambda: (
                    running.http.get("/load").json()
                    == {"server_load": 6, "queued_requests": 6, "queued_tokens": 602, **limits}
                )
            )
            assert running.samples()["num_requests_running"] == 2
        wait_until(lambda: running.http.get("/load").json() == idle)


def test_what_needs_the_model_waits_for_it(tiny_model: Path) -> None:
    may_go_on = threading.Event()

    def load() -> Engine:
        assert may_go_on.wait(30)
        return loader(tiny_model)()

    with RunningServer(load, wait_until_ready=False) as running:
        try:
            for path in ("/load", f"/v1/models/{MODEL}"):
                assert "loading" in read_error(running.http.get(path), 503)["message"]
            for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
                assert "loading" in read_error(running.http.post(path, json=body), 503)["message"]
            read_error(running.http.get("/v1/models/other"), 404)
        finally:
            may_go_on.set()


def test_version_is_that_of_the_package(server: RunningServer) -> None:
    assert server.http.get("/version").json() == {"version": version("nanovllm")}


def test_health_is_200_when_the_model_is_loaded(server: RunningServer) -> None:
    for path in ("/health", "/health/", "/ping"):
        assert server.http.get(path).json() == {"status": "ready"}


def test_health_is_503_while_the_server_drains_and_serves(server: RunningServer) -> None:
    server.control.is_draining = True
    try:
        error = read_error(server.http.get("/health"), 503)
        assert "about to stop" in error["message"]
        assert server.complete("the", max_tokens=1)["choices"]
    finally:
        server.control.is_draining = False
    assert server.http.get("/health").status_code == 200


GET_PATHS = (
    *("/health", "/metrics", "/version", "/load", "/tokenizer_info", "/v1/models", "/docs"),
    *(f"/v1/models/{MODEL}", "/v1/models/other", "/nope", "/version/", "/nope/"),
)


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_is_answered_as_get_is_without_the_content(server: RunningServer, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        for method, kept in (("HEAD", "keep-alive"), ("GET", "close")):
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: {kept}\r\n\r\n"
            connection.sendall(head.encode())
        with connection.makefile("rb") as received:
            answers = received.read().split(b"HTTP/1.1 ")
    _, (sent, content), (expected, got) = (part.partition(b"\r\n\r\n")[::2] for part in answers)
    assert (content, bool(got)) == (b"", True)
    assert sent.split()[0] == expected.split()[0]
    names = {line.partition(b":")[0].lower() for line in expected.splitlines()[1:]} - {
        b"connection"
    }
    assert {line.partition(b":")[0].lower() for line in sent.splitlines()[1:]} == names
    assert names >= {b"content-type", b"content-length", b"x-request-id"}


def test_head_is_not_allowed_where_get_is_not(server: RunningServer) -> None:
    response = server.http.head("/v1/completions")
    assert (response.status_code, response.headers["allow"], response.content) == (405, "POST", b"")


def test_the_description_of_the_api_can_be_built_and_names_every_field(
    server: RunningServer,
) -> None:
    document = server.http.get("/openapi.json").json()
    status = {"/health", "/version", "/metrics", "/load", "/v1/models", "/v1/models/{model_id}"}
    assert status | {"/v1/completions", "/tokenize", "/detokenize"} <= document["paths"].keys()
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {
        "prompt",
        "max_tokens",
        "stop",
        "logit_bias",
        "stream_options",
        "top_k",
    } <= fields.keys()
    assert len(fields["prompt"]["oneOf"]) == 4
    assert server.http.get("/docs").status_code == 200


@pytest.fixture
def counted(tiny_model: Path) -> Iterator[RunningServer]:
    """A server that nobody has asked anything."""
    with RunningServer(loader(tiny_model)) as running:
        yield running


def test_metrics_have_the_names_and_types_that_dashboards_know(counted: RunningServer) -> None:
    response = counted.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    types = dict(
        line.split()[2:4] for line in response.text.splitlines() if line.startswith("# TYPE ")
    )
    assert all(types[f"nanovllm:{name}"] == "gauge" for name in GAUGES)
    assert all(types[f"nanovllm:{name}"] == "counter" for name in COUNTERS)
    assert all(types[f"nanovllm:{name}"] == "histogram" for name in HISTOGRAMS)
    samples = counted.samples()
    assert {*GAUGES, *WAITING_BY_REASON, *COUNTERS} <= samples.keys()
    assert {f"{name}_count" for name in HISTOGRAMS} <= samples.keys()
    assert {
        f"request_success_total{{finished_reason={reason}}}" for reason in ("stop", "length")
    } <= samples.keys()
    assert "time_to_first_token_seconds_bucket{le=0.001}" in samples
    blocks = counted.engine.engine.blocks
    (info,) = [name for name in samples if name.startswith("cache_config_info")]
    assert {f"block_size={blocks.block_size}", f"num_gpu_blocks={blocks.num_blocks}"} <= set(
        re.findall(r"\w+=\w+", info)
    )
    if sys.platform == "linux":
        assert samples["process_resident_memory_bytes"] > 1 << 20
        assert samples["process_cpu_seconds_total"] > 0


def test_metrics_count_what_was_asked(counted: RunningServer) -> None:
    before = counted.samples()
    settings: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    counted.complete([1] * 40, max_tokens=8, **settings)
    counted.complete([1] * 40, max_tokens=5, **settings)
    counted.stream([[2, 3], [4, 5]], n=2, max_tokens=3, temperature=1.0, ignore_eos=True)
    counted.complete("the", max_tokens=4, logit_bias={"5": 100}, stop_token_ids=[5])
    counted.complete("a", max_tokens=0, echo=True)
    now = {name: value - before.get(name, 0) for name, value in counted.samples().items()}
    assert not any(now[name] for name in GAUGES)
    assert now["generation_tokens_total"] == 8 + 5 + 4 * 3 + 1
    assert now["prefix_cache_hits_total"] == 32
    assert now["prefix_cache_queries_total"] == 40 + 40 + 2 * 2 + 1 + 1
    assert now["prompt_tokens_computed_total"] == 40 + (40 - 32) + 2 * 2 + 1 + 1
    assert now["prompt_tokens_total"] == now["request_prompt_tokens_sum"]
    assert now["prompt_tokens_cached_total"] == 32 + 2 * 2, "the second choice shares its prompt"
    assert now["prompt_tokens_by_source_total{source=local_cache_hit}"] == 32 + 2 * 2
    assert now["prompt_tokens_by_source_total{source=local_compute}"] == 40 + 8 + 2 * 2 + 1 + 1
    assert now["request_prefill_kv_computed_tokens_sum"] == 40 + 8 + 2 * 2 + 1 + 1
    assert now["request_success_total{finished_reason=length}"] == 1 + 1 + 4 + 1
    assert now["request_success_total{finished_reason=stop}"] == 1
    assert now["request_prompt_tokens_sum"] == 40 + 40 + 4 * 2 + 1 + 1
    assert now["request_generation_tokens_sum"] == 8 + 5 + 4 * 3 + 1
    assert now["e2e_request_latency_seconds_count"] == 8
    assert now["request_queue_time_seconds_count"] == 8
    assert now["time_to_first_token_seconds_count"] == 7
    assert now["inter_token_latency_seconds_count"] == 7 + 4 + 4 * 2
    assert now["request_time_per_output_token_seconds_count"] == 6
    assert now["request_inference_time_seconds_count"] == 8
    assert (
        now["iteration_tokens_total_sum"]
        == now["prompt_tokens_computed_total"] + now["generation_tokens_total"]
    )
    assert now["request_params_n_sum"] == 1 + 1 + 2 * 2 + 1 + 1
    assert now["request_params_n_count"] == 6
    assert now["request_max_num_generation_tokens_sum"] == 8 + 5 + 2 * 3 + 1
    assert now["request_params_max_tokens_sum"] == 8 + 5 + 4 * 3 + 4
    assert now["request_params_max_tokens_count"] == 7, "not of the one that only reads its prompt"
    assert now["request_num_preemptions_count"] == 8
    assert now["request_num_preemptions_sum"] == 0
    assert now["http_requests_total{handler=/v1/completions}{method=POST}{status=2xx}"] == 5
    assert 0 < now["e2e_request_latency_seconds_sum"] < 30
    assert now["num_preemptions_total"] == 0


def test_http_requests_are_counted_by_route(server: RunningServer) -> None:
    """No label has what a client wrote: a server would remember it for ever."""
    before = server.samples()
    server.http.get("/v1/models/tiny-is-not-served")
    server.http.get("/nowhere/at/all")
    server.http.request("BREW", "/v1/completions")
    server.http.get("/v1/models/")
    for path in ("/health", "/health/", "/ping"):
        server.http.get(path)
    now = {name: value - before.get(name, 0) for name, value in server.samples().items()}
    counted = {
        name.removeprefix("http_requests_total"): value
        for name, value in now.items()
        if name.startswith("http_requests_total") and value
    }
    assert counted == {
        "{handler=/v1/models/{model_id:path}}{method=GET}{status=4xx}": 1,
        "{handler=none}{method=GET}{status=4xx}": 1,
        "{handler=/v1/models}{method=GET}{status=2xx}": 1,
        "{handler=/v1/completions}{method=other}{status=4xx}": 1,
    }


def test_a_sequence_that_waits_for_its_grammar_is_deferred(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequenceGrammar, "is_ready", False)
    body = {"prompt": "the", "structured_outputs": {"regex": "a"}}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.complete, **body)
        try:
            wait_until(lambda: server.samples()[WAITING_BY_REASON[1]] == 1)
            assert server.samples()[WAITING_BY_REASON[0]] == 0
            assert server.samples()["num_requests_waiting"] == 1
        finally:
            monkeypatch.undo()
        assert answer.result()["choices"][0]["text"] == "a"
    assert server.samples()[WAITING_BY_REASON[1]] == 0


def test_an_answer_that_a_stop_string_ends_counts_as_stopped(tiny_model: Path) -> None:
    """The engine cancels it as for a client that left, but a client that left does not count."""
    body = {"allowed_token_ids": [ord("k") - 33], "max_tokens": 100, "n": 2}
    with RunningServer(loader(tiny_model, step_s=0.02)) as running:
        for choice in running.complete("the", stop="kkk", **body)["choices"]:
            assert choice["finish_reason"] == "stop"
        with running.http.stream(
            "POST", "/v1/completions", json={"prompt": "the", "stream": True, **body}
        ):
            pass
        wait_until(
            lambda: (
                running.is_idle()
                and running.samples()["request_success_total{finished_reason=stop}"] >= 2
            )
        )
        now = running.samples()
    assert now["request_success_total{finished_reason=stop}"] == 2
    assert now["request_success_total{finished_reason=length}"] == 0
    assert now["e2e_request_latency_seconds_count"] == 2
    assert now["request_prompt_tokens_sum"] == 2
    assert 2 * 3 <= now["request_generation_tokens_sum"] < 20


def test_nothing_has_been_counted_before_the_first_request(counted: RunningServer) -> None:
    names = {*GAUGES, *WAITING_BY_REASON, *COUNTERS}
    samples = counted.samples()
    assert {name: samples[name] for name in names} == dict.fromkeys(names, 0)
    assert not any(samples[f"{name}_count"] for name in HISTOGRAMS)


def test_a_gauge_shows_how_full_the_cache_is(tiny_model: Path) -> None:
    with (
        RunningServer(loader(tiny_model, step_s=0.05, num_blocks=10)) as running,
        running.http.stream(
            "POST",
            "/v1/completions",
            json={"prompt": [1] * 60, "stream": True, "max_tokens": 50, "ignore_eos": True},
        ) as response,
    ):
        chunks = response.iter_raw()  # kept: the connection closes with it
        next(chunks)
        assert 0.4 <= running.samples()["kv_cache_usage_perc"] <= 0.7
