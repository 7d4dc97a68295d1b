"""`nanovllm bench latency` and `throughput`: figures, JSON, and errors before measuring."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.bench.offline import Bench, Job, read_dataset
from nanovllm.cli.bench.roofline import (
    Costs,
    Limits,
    Phase,
    Phases,
    fractions,
    shown_fractions,
)
from nanovllm.cli.main import main
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.model.families.registry import load_config
from tests.support.bench import bench, refused
from tests.support.checkpoints import write_tiny_model

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "benchmark.py"


def test_latency_reports_percentiles_and_both_phases(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, backend: str
) -> None:
    work = (
        f"--backend {backend} --input-len 8 --output-len 5 --batch-size 3 --num-iters 4 "
        "--num-iters-warmup 1"
    )
    record = bench(capsys, "latency", tiny_model, work)
    assert record["benchmark"] == "latency"
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (4 * 3 * 8, 4 * 3 * 5)
    assert (record["prefix_caching"], record["total_cached_tokens"]) == (False, 0)
    latencies = sorted(record["latencies_s"])
    assert len(latencies) == record["num_iters"] == 4
    assert record["avg_latency_s"] == pytest.approx(sum(latencies) / 4)
    assert record["p50_latency_s"] == pytest.approx((latencies[1] + latencies[2]) / 2)
    percentiles = [record[f"p{percent}_latency_s"] for percent in (10, 25, 50, 75, 90, 99)]
    assert percentiles == sorted(percentiles)
    in_steps_s = (
        record["total_input_tokens"] / record["prefill_tokens_per_s"]
        + 4 * 3 * 4 / record["decode_tokens_per_s"]
    )
    assert 0.2 * sum(latencies) < in_steps_s <= sum(latencies), (
        "the first token of each answer comes from prefill, the other four from decoding"
    )


def test_an_answer_of_one_token_has_no_decode_phase(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    record = bench(
        capsys,
        "latency",
        tiny_model,
        "--input-len 8 --output-len 1 --num-iters 1 --num-iters-warmup 0",
    )
    assert record["decode_tokens_per_s"] is None
    assert record["prefill_tokens_per_s"] > 0


def test_throughput_counts_every_token(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, backend: str
) -> None:
    file = tmp_path / "figures.json"
    record = bench(
        capsys,
        "throughput",
        tiny_model,
        f"--num-prompts 5 --input-len 16 --output-len 7 --json {file} --backend {backend}",
    )
    assert (
        record["total_input_tokens"],
        record["total_output_tokens"],
        record["total_cached_tokens"],
    ) == (5 * 16, 5 * 7, 0)
    seconds = record["duration_s"]
    assert record["requests_per_s"] * seconds == pytest.approx(5)
    assert record["output_tokens_per_s"] * seconds == pytest.approx(5 * 7)
    assert record["total_tokens_per_s"] * seconds == pytest.approx(5 * 23)
    assert record["prefill_tokens_per_s"] > 0
    assert record["decode_tokens_per_s"] > 0
    assert record["settings"]["max_num_seqs"] == 32
    assert json.loads(file.read_text(encoding="utf-8")) == record


@pytest.mark.parametrize("kind", ["latency", "throughput"])
def test_outputs_have_full_length_for_any_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    write_tiny_model(tmp_path, config={"eos_token_id": list(range(267))})
    iterations = (
        ("--num-iters", 1, "--num-iters-warmup", 0, "--batch-size", 4)
        if kind == "latency"
        else ("--num-prompts", 4)
    )
    assert (
        bench(capsys, kind, tmp_path, "--input-len", 4, "--output-len", 5, *iterations)[
            "total_output_tokens"
        ]
        == 20
    )


def test_preemptions_are_reported(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    cache = 2 * 4 * 2 * 32 * 64  # keys and values, 4 bytes, 2 layers, d_model 32: 64 tokens
    work = (
        "--num-prompts 4 --input-len 20 --output-len 30 --block-size 4 --backend numpy "
        f"--kv-cache-memory {cache}"
    )
    record = bench(capsys, "throughput", tiny_model, work)
    assert record["num_preemptions"] > 0
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (80, 120), (
        "what is computed again is not counted again"
    )


def test_prefix_caching_is_an_option(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    work = "--input-len 40 --output-len 2 --batch-size 2 --num-iters 1 --num-iters-warmup 1"
    record = bench(capsys, "latency", tiny_model, work, "--enable-prefix-caching")
    assert (record["prefix_caching"], record["total_cached_tokens"]) == (True, 2 * 32), (
        "one block of 32 tokens is whole"
    )


def test_the_seed_makes_the_prompts(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanovllm.engine.input_processor import InputProcessor

    seen: list[object] = []
    process = InputProcessor.process

    def recording(self: InputProcessor, request: Any) -> Any:
        if request.request_id == "bench":
            seen.extend(request.prompts)
        return process(self, request)

    monkeypatch.setattr(InputProcessor, "process", recording)
    for seed in (3, 3, 4):
        bench(
            capsys,
            "throughput",
            tiny_model,
            f"--num-prompts 1 --input-len 12 --output-len 1 --seed {seed}",
        )
    assert seen[0] == seen[1] != seen[2]


def test_a_dataset_says_prompts_and_lengths(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "abc", "max_tokens": 2, "id": 7},
        {"prompt": [1, 2]},
        {"prompt": "x\u2028y", "max_tokens": 3},
    ]
    file.write_text(
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8"
    )
    record = bench(capsys, "throughput", tiny_model, "--dataset", file, "--output-len", 4)
    assert (record["num_prompts"], record["total_output_tokens"]) == (3, 2 + 4 + 3)
    assert record["total_input_tokens"] == 3 + 2 + 5
    record = bench(
        capsys, "throughput", tiny_model, "--dataset", file, "--output-len", 4, "--num-prompts", 2
    )
    assert (record["num_prompts"], record["total_output_tokens"]) == (2, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt":', "line 2 is not JSON"),
        ('\n"a"', "line 2 must be an object with a prompt"),
        ('{"text": "a"}', "line 1 must be an object with a prompt"),
        (
            '{"prompt": "a", "max_tokens": 0}',
            "line 1: max_tokens is 0 but must be an integer of at least 1",
        ),
        ('{"prompt": "a", "max_tokens": true}', "line 1: max_tokens is True"),
    ],
)
def test_an_invalid_dataset_is_an_error_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_dataset(file, None, 8)


def test_lengths_beyond_the_context_are_an_error_with_the_numbers(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    for kind in ("latency", "throughput"):
        error = refused(capsys, kind, tiny_model, "--input-len", 100, "--output-len", 29)
        assert (
            "100 tokens and an output of 29 are 129 together, more than the context of 128" in error
        )
    assert "more than the context of 64" in refused(
        capsys, "latency", tiny_model, "--max-model-len", 64, "--input-len", 60, "--output-len", 5
    )
    assert "--batch-size is 33, but only 32" in refused(
        capsys, "latency", tiny_model, "--batch-size", 33
    )
    assert "temperature is -1.0" in refused(
        capsys, "latency", tiny_model, "--temperature", -1, "--output-len", 9
    )
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "a", "max_tokens": 128}', encoding="utf-8")
    assert "line 2: a prompt of 1 token and an output of 128 are 129" in refused(
        capsys, "throughput", tiny_model, "--dataset", file
    )
    file.write_text('{"prompt": 7}', encoding="utf-8")
    assert re.search(
        "line 1: .* must be text or a list of token ids",
        refused(capsys, "throughput", tiny_model, "--dataset", file),
    )
    assert "does not exist" in refused(capsys, "latency", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kind", "flags", "lengths"),
    [
        ("latency", (), (12, 52)),
        ("latency", ("--input-len", 60), (60, 4)),
        ("throughput", (), (42, 22)),
        ("throughput", ("--output-len", 50), (14, 50)),
    ],
)
def test_default_lengths_are_shortened_to_the_context(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    kind: str,
    flags: tuple[object, ...],
    lengths: tuple[int, int],
) -> None:
    """As for a model of nanovllm train, whose context may be 64."""
    size = ("--num-iters", 1, "--batch-size", 2) if kind == "latency" else ("--num-prompts", 2)
    assert main(["bench", kind, *map(str, (tiny_model, "--max-model-len", 64, *size, *flags)),
                 *(("--no-limits",) if kind == "latency" else ())]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    record = json.loads(out.splitlines()[-1])
    assert (record["input_len"], record["output_len"]) == lengths
    shown = f"context of 64 tokens: {lengths[0]} for a prompt, {lengths[1]} for its output"
    assert shown in err


def test_lengths_are_checked_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert "more than the context of 128" in refused(
        capsys, "latency", tmp_path, "--input-len", 128
    )


def test_invalid_options_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ["latency", "--batch-size", "0"],
        ["serve", "--request-rate", "-1"],
        ["serve", "--request-rate", "nan"],
        [],
        ["speed"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *flags])
        assert stopped.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_step_that_reads_a_prompt_counts_as_prefill() -> None:
    phases = Phases()
    phases.add(StepStats(100, 100, 0, 0.5))
    phases.add(StepStats(60, 50, 10, 0.25))
    phases.add(StepStats(8, 0, 8, 0.125))
    phases.add(StepStats(8, 0, 8, 0.125))
    assert phases.figures() == {"prefill_tokens_per_s": 200.0, "decode_tokens_per_s": 64.0}


def test_latency_tells_the_share_of_the_machines_limits(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    work = (
        "--input-len 8 --output-len 5 --batch-size 3 --num-iters 2 --num-iters-warmup 0 "
        "--num-threads 1"
    )
    assert main(["bench", "latency", str(tiny_model), "--backend", "numpy", *work.split()]) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    limits = record["limits"]
    assert (limits["threads"], limits["kind"]) == (1, "float32")
    for share in ("prefill, of float32 peak", "decode, of"):
        assert re.search(rf"^{share}.* %$", out, re.MULTILINE), share
    assert f"1 thread read {limits['bandwidth'] / 1e9:,.1f} GB/s" in out
    model = load_config(tiny_model)
    matrices = 2 * 12 * 32**2 + model.vocab * 32
    weights_bytes = 4 * (matrices + 2 * 13 * 32 + 2 * 32)
    cached = 3 * (9 + 10 + 11 + 12) / 4  # tokens seen in a step, of three sequences
    assert record["decode_bytes_per_step"] == weights_bytes + cached * 2 * 2 * 32 * 4
    steps_per_s = record["decode_tokens_per_s"] / 3
    assert record["decode_bandwidth_fraction"] == pytest.approx(
        record["decode_bytes_per_step"] * steps_per_s / limits["bandwidth"]
    )
    operations = 8 * 2 * 2 * 12 * 32**2 + 36 * 4 * 2 * 32 + 2 * model.vocab * 32  # of one sequence
    assert record["prefill_peak_fraction"] == pytest.approx(
        operations * record["prefill_tokens_per_s"] / 8 / limits["peak"]
    )


def test_limits_are_those_of_the_weights_in_memory(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    work = "--input-len 4 --output-len 2 --batch-size 1 --num-iters 1 --num-iters-warmup 0"
    record = bench(capsys, "latency", tiny_model, work, "--dtype auto --num-threads 1 --limits")
    assert (record["limits"]["threads"], record["limits"]["kind"]) == (1, "float32")


def test_chunks_of_a_prompt_and_decodes_beside_them_are_all_counted(tiny_model: Path) -> None:
    engine = Engine.load(
        tiny_model, EngineConfig(max_num_batched_tokens=32, enable_prefix_caching=False)
    )
    measured = Bench(engine, temperature=0.0)
    measured.run([Job(f"prompt {length}", [1] * length, 4) for length in (10, 70)])
    phases = (measured.phases.prefill, measured.phases.decode)
    assert sum(phase.computed for phase in phases) == 80 + 2 * 3
    assert sum(phase.pairs for phase in phases) == sum(
        length * (length + 1) // 2 for length in (13, 73)
    )
    assert sum(phase.rows for phase in phases) == 2 * 4
    assert phases[0].steps > 2


def test_pairs_before_a_window_do_not_count(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, config={"model_type": "mistral", "sliding_window": 9})
    measured = Bench.load(str(folder), EngineConfig(), temperature=0.0)
    measured.run([Job("prompt", list(range(7)), 4), Job("longer", list(range(20)), 4)])
    phases = measured.phases
    assert phases.prefill.pairs == sum(
        min(length, 9) for end in (7, 20) for length in range(end + 1)
    )
    assert phases.decode.keys == (8 + 9 + 9) + 3 * 9


def test_a_missing_peak_is_reported() -> None:
    limits = Limits(2, "int8", 5e10, None, "int16")
    phases = Phases(Phase(8, 0.5, 1, 8, 36, 1, 8), Phase(4, 0.5, 4, 4, 42, 4, 42))
    reached = fractions(Costs(1000, 8.0, 10, 10, 10), limits, phases)
    assert reached["prefill_peak_fraction"] is None
    assert reached["decode_bandwidth_fraction"] == pytest.approx((4 * 1000 + 42 * 8) / 0.5 / 5e10)
    assert shown_fractions(reached, limits)["prefill, of int8 peak"] == "-"
    assert "no int8 instruction" in str(limits)


def test_the_peak_of_widened_weights_is_called_that_of_float32() -> None:
    limits = Limits(2, "bfloat16", 5e10, 3.4e11, "float32")
    assert "340 GFLOPS in float32" in str(Limits.mean([limits, limits]))
    reached = dict.fromkeys(("prefill_peak_fraction", "decode_peak_fraction"), 0.5)
    shown = shown_fractions({**reached, "decode_bandwidth_fraction": 0.4}, limits)
    assert shown == {"prefill, of float32 peak": "50 %", "decode, of float32 peak": "50 %"}


def test_the_script_runs_from_anywhere(tiny_model: Path, tmp_path: Path) -> None:
    flags = "--input-len 4 --output-len 2 --num-iters 1 --num-iters-warmup 0 --no-limits"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "latency", str(tiny_model), *flags.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Batches" not in done.stderr, "no progress bar where there is no terminal"
    assert json.loads(done.stdout.splitlines()[-1])["total_output_tokens"] == 16
