"""What the benchmarks tell about drafts, from an engine or from the text of /metrics."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.bench.drafts import Drafts
from nanovllm.cli.bench.offline import Bench, Job
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from tests.support.bench import bench
from tests.support.speculation import draft_always

METRICS = """# HELP vllm:spec_decode_num_drafts_total x
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 8.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 24.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 9.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 4e0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 0.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e9
"""


def test_the_text_of_metrics_is_read() -> None:
    drafts = Drafts.of_metrics(METRICS)
    assert drafts.figures() == {
        "spec_decode_num_drafts": 8,
        "spec_decode_draft_tokens": 24,
        "spec_decode_accepted_tokens": 10,
        "spec_decode_acceptance_rate": pytest.approx(100 * 10 / 24),
        "spec_decode_acceptance_length": 1 + 10 / 8,
        "spec_decode_per_position_acceptance_rates": [75.0, 50.0, 0.0],
    }
    assert drafts.shown()["accepted by position"] == "75, 50, 0 %"
    assert Drafts.of_metrics("nanovllm:prompt_tokens_total 5.0\n") == Drafts()


def test_what_was_before_does_not_count() -> None:
    all_of_it = Drafts.of_metrics(METRICS)
    assert all_of_it.since(all_of_it).figures() == {}
    assert all_of_it.since(Drafts()) == all_of_it
    assert Drafts().shown() == {}


def test_a_run_with_drafts_counts_tokens_rows_and_keys(tiny_model: Path) -> None:
    settings: dict[str, Any] = {"backend": "numpy", "enable_prefix_caching": False}
    model = {"model": str(tiny_model), "num_speculative_tokens": 4}
    plain, drafting = (
        Bench(draft_always(Engine.load(tiny_model, EngineConfig(**settings))), 0.0)
        for settings in (settings, {**settings, "speculative_config": model})
    )
    totals = [each.run([Job("a prompt", [1, 2, 3], 21)]) for each in (plain, drafting)]
    assert {total.output_tokens for total in totals} == {21}
    drafts = Drafts.of_engine(drafting.engine.stats())
    before, after = plain.phases.decode, drafting.phases.decode
    assert before.tokens == after.tokens == 20
    assert after.steps < before.steps == 20
    assert after.rows == after.computed == after.steps + drafts.drafted
    assert drafts.accepted == 20 - after.steps
    assert before.keys == before.pairs > after.keys
    assert after.pairs >= before.pairs


def test_the_option_is_one_of_the_benchmarks(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    record = bench(
        capsys, "latency", tiny_model, "--backend numpy --no-limits --num-iters 1 --output-len 4",
        "--num-iters-warmup 0 --speculative-config", '{"method":"ngram"}',
    )  # fmt: skip
    assert record["settings"]["speculative_config"]["num_speculative_tokens"] == 5
