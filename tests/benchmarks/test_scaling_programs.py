"""The programs that measure replicas: what they report, on a server of a tiny model."""

import json
import xml.etree.ElementTree as ET
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scaling import replicas, routing, simulate
from benchmarks.scaling.cost_model import CostModel, FrontCost, check_fit
from benchmarks.scaling.deployments import Deployment, one_server
from benchmarks.scaling.front_cost import front_cost
from benchmarks.scaling.trace import Arrival
from benchmarks.table import markdown

COST = CostModel(step=5e-4, prompt=6e-5, decode=1e-4, context=2e-8)


@pytest.fixture(scope="module")
def deployment(tiny_model: Path) -> Iterator[Deployment]:
    with one_server(str(tiny_model), 1, ["--backend", "numpy", "--batch-invariant"]) as started:
        started.wait_until_healthy()
        yield started


def test_a_trace_is_replayed_in_full(deployment: Deployment) -> None:
    arrivals = [Arrival(0.02 * number, (5,) * 40, 3) for number in range(6)]
    result = routing.replay(deployment, arrivals)
    assert result.output_tokens == 18
    assert result.requests_per_replica == [6]
    assert result.hit_rate > 0.5
    assert 0.1 < result.duration_s < 60
    assert min(result.ttft_s) > 0


def test_a_request_that_fails_ends_the_replay(deployment: Deployment) -> None:
    with pytest.raises(RuntimeError, match="1 of 1 requests failed"):
        routing.replay(deployment, [Arrival(0.0, (5,), 100_000)])


def test_the_time_beside_the_step_is_measured(deployment: Deployment) -> None:
    assert routing.request_s(deployment, CostModel(0, 0, 0, 0), FrontCost()) > 0
    assert routing.request_s(deployment, CostModel(60, 0, 0, 0), FrontCost()) == 0
    assert routing.request_s(deployment, CostModel(0, 0, 0, 0), FrontCost(ingress_request=60)) == 0


def test_blocks_and_requests_are_read_from_the_metrics(deployment: Deployment) -> None:
    assert routing.blocks_of(deployment) > 100
    before = sum(routing.answered(deployment).values())
    deployment.ask("/v1/completions", {"prompt": [1], "max_tokens": 1})
    assert sum(routing.answered(deployment).values()) == before + 1


def test_answers_are_comparable(deployment: Deployment) -> None:
    first, second = (replicas.sample_answers(deployment) for _ in range(2))
    assert first == second
    assert len({json.dumps(choices) for choices in first}) == len(first)


def test_a_load_is_measured(deployment: Deployment) -> None:
    figures = replicas.bench(deployment, 2, Namespace(input_tokens=8, output_tokens=4))
    assert figures["output_throughput"] > 0
    assert 0 < figures["median_ttft_ms"] <= figures["p99_ttft_ms"]
    assert figures["median_tpot_ms"] >= 0  # 0 where all tokens come at once


def test_replicas_are_compared_within_a_round() -> None:
    def figures(throughput: float, ttft_ms: float) -> dict[str, float]:
        return {
            "output_throughput": throughput, "median_ttft_ms": ttft_ms,
            "p99_ttft_ms": 2 * ttft_ms, "median_tpot_ms": 1.0,
        }  # fmt: skip

    runs: replicas.Runs = {
        replicas.SERVER: {"1": [figures(100, 5), figures(200, 5), figures(50, 5)]},
        replicas.REPLICAS: {"1": [figures(50, 20), figures(90, 22), figures(45, 30)]},
        replicas.SMALL_SERVER: {"1": [figures(60, 10), figures(120, 10), figures(30, 10)]},
    }
    record = replicas.summary(runs)
    assert record["ratios"] == {"1": 0.5}
    assert record["overhead_ms"] == {"median_ttft_ms": 12, "median_tpot_ms": 0.0}
    table = markdown(origin("replicas", classes={"float32": record}))
    assert "| 1 | 2 replicas | 50 | 22 ms | 44 ms | 0.50 |" in table
    assert "median_ttft_ms of a replica less that of a server of 1 thread: +12.00 ms" in table


def test_a_bad_fit_ends_the_simulation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> Any:
        check_fit(np.array([0.01, -0.63, 0.9]))

    monkeypatch.setattr(simulate, "measure", measure)
    assert simulate.main(["--replicas", "1"]) == 2
    shown = capsys.readouterr()
    assert "misses the measured steps by 63% in the median, more than 20%" in shown.err
    assert "replicas" not in shown.out
    check_fit(np.array([0.1, -0.1, 0.9]))


def test_the_cost_of_a_token_is_what_a_stream_costs_more() -> None:
    cost = front_cost({"proxy": 0.005, "ingress": 0.01}, {"proxy": 0.013, "ingress": 0.026}, 8)
    assert (cost.proxy_request, cost.ingress_request) == (0.005, 0.01)
    assert (cost.proxy_token, cost.ingress_token) == pytest.approx((0.001, 0.002))
    assert cost.ingress_capacity(8) == pytest.approx(1 / 0.026)


def origin(benchmark: str, **record: Any) -> dict[str, Any]:
    machine = {"cpu": "a processor", "nanovllm": "0"}
    return {
        "benchmark": benchmark, "date": "2026-01-01", "threads": 1, "seed": 1, "machine": machine,
        **record,
    }  # fmt: skip


def test_the_simulation_is_tabulated_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from tools import scaling_chart as plot

    monkeypatch.setattr(simulate, "_REQUESTS_PER_REPLICA", 20)
    COST.save(tmp_path / "cost.json")
    file, chart = tmp_path / "figures.json", tmp_path / "chart.svg"
    arguments = ["--cost", str(tmp_path / "cost.json"), "--replicas", "1", "2"]
    arguments += ["--replicas-per-ingress", "1"]
    assert simulate.main([*arguments, "--json", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert len(record["runs"]) == 2 * (3 + 4)  # two replicas also with a single ingress
    assert record["cost"] == {**record["cost"], "step": COST.step, "request": 0.0}
    assert record["front"]["ingress_request"] > 0
    table = markdown(record)
    assert table.count("| poisson | 2 | 2 |") == 3
    assert table.count("| poisson | 2 | 1 |") == 1
    assert plot.main([str(file), "--output", str(chart)]) == 0
    text = chart.read_text(encoding="utf-8")
    assert ET.fromstring(text).tag.endswith("svg")
    assert "prompt tokens found cached" in text
    assert "prefix, one ingress" in text
    assert str(chart) in capsys.readouterr().out
