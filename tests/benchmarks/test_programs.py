"""Each benchmark runs on a tiny model and ends in a line of JSON."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, http_cost, model_sizes, roofline, step_profile, table
from benchmarks.make_model import LLAMA_SIZES, SIZES, make_model
from nanovllm import LLM, SamplingParams
from nanovllm.model.families.registry import load_config, read_config
from tests.load import engine_soak

NUMPY = ["--ours", '{"backend": "numpy"}', "--scale", "8", "--threads", "1"]
TINY: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 300,
    "n_positions": 128,
}
COMPARE = ("--peers", "none", "--classes", "float32", "--rounds", 2, "--seed", 3)
ROOFLINE = ("--classes", "float32", "--pairs", 3)
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench") / "model", **TINY)


@pytest.fixture(scope="module")
def records() -> dict[Any, dict[str, Any]]:
    """The JSON of each program and its arguments: no test runs the same again."""
    return {}


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, records: dict[Any, Any]
) -> Run:
    """run(program, *arguments) returns the JSON of its last line, also written to figures.json."""

    def run(
        program: Callable[[Sequence[str]], int], *arguments: object, code: int = 0
    ) -> dict[str, Any]:
        file, key = tmp_path / "figures.json", (program, *arguments)
        if key in records:
            file.write_text(json.dumps(records[key]), encoding="utf-8")
            return copy.deepcopy(records[key])
        assert (
            program(["--model", str(model), "--json", str(file), *NUMPY, *map(str, arguments)])
            == code
        )
        record: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads(file.read_text(encoding="utf-8")) == record
        assert record["machine"]["cpu"]
        records[key] = copy.deepcopy(record)
        return record

    return run


def test_compare_without_peers(run: Run) -> None:
    record = run(compare.main, *COMPARE)
    assert (record["benchmark"], record["rounds"], record["seed"]) == ("compare", 2, 3)
    found = record["classes"]["float32"]
    assert found["problems"] == {}
    assert found["bandwidth_bytes_per_s"]["min"] > 0
    assert (found["peak_operations_per_s"] > 0, found["peak_type"]) == (True, "float32")
    works = found["contenders"]["nanovllm"]["workloads"]
    assert set(works) == {"decode1", "prefill512", "serve32"}
    assert all(
        len(work["tokens_per_s"]["all"]) == 2 and work["tokens_per_s"]["min"] > 0
        for work in works.values()
    )
    assert works["decode1"]["share_of_limit"] > 0
    assert works["prefill512"]["share_of_limit"] > 0


def test_a_peer_that_is_not_installed_is_left_out_and_one_that_is_us_agrees(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import contenders

    monkeypatch.setattr(
        contenders,
        "PEERS",
        {
            **contenders.PEERS,
            "vllm": {"float32": ["float32"]},
            "openvino": {"float32": ['{"backend": "numpy"}']},
        },
    )
    listed = contenders.entries

    def with_a_twin(*arguments: Any) -> list[contenders.Entry]:
        return [
            contenders.Entry(
                entry.name,
                "ours" if entry.module == "openvino" else entry.module,
                entry.variant,
                entry.python,
            )
            for entry in listed(*arguments)
        ]

    monkeypatch.setattr(compare, "entries", with_a_twin)
    flags = (
        "--peers",
        "vllm,openvino",
        "--classes",
        "float32",
        "--rounds",
        1,
        "--workloads",
        "serve32",
    )
    found = run(compare.main, *flags)["classes"]["float32"]
    assert found["problems"] == {"vllm float32": "not installed: No module named 'vllm'"}
    twin = 'openvino {"backend": "numpy"}'
    assert found["ratios"]["serve32"].keys() == {twin}
    agreement = found["contenders"][twin]["agreement"]["serve32"]
    assert (agreement["requests"], agreement["equal"], agreement["equal_tokens"]) == (4, 4, 1.0)


def test_compare_fails_where_ours_fails(run: Run) -> None:
    record = run(
        compare.main,
        "--peers",
        "none",
        "--classes",
        "float32",
        "--ours",
        '{"backend": "nothing"}',
        code=1,
    )
    assert "backend is 'nothing'" in record["classes"]["float32"]["problems"]["nanovllm"]


def test_unknown_names_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ["--peers", "torch"],
        ["--classes", "float16"],
        ["--peer-python", "torch=/bin/python"],
        ["--workloads", "decode2"],
    ):
        with pytest.raises(SystemExit):
            compare.main(flags)
        assert (
            "float32" in (error := capsys.readouterr().err)
            or "llamacpp" in error
            or "decode1" in error
        )


def test_roofline_tells_shares_with_their_spread(run: Run) -> None:
    record = run(roofline.main, *ROOFLINE)
    for name in ("decode1", "prefill512"):
        share = record["classes"]["float32"][name]["share"]
        assert 0 < share["min"] <= share["p25"] <= share["median"] <= share["p75"] <= share["max"]
        assert len(share["all"]) == 3


def test_step_profile_has_the_operations_of_each_step(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model), "--classes", "float32", "--steps", "2,p30", "--context", "9"]
    assert step_profile.main([*flags, "--threads", "1", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    for label in ("**float32, 2**", "**float32, p30**", "qkv", "Python"):
        assert f"| {label} |" in shown
    results = json.loads(shown.splitlines()[-1])["results"]
    assert [result["step"] for result in results] == ["2", "p30"]
    by_name = {each["name"]: each for each in results[1]["operations"]}
    assert by_name["up"]["operations"] == 2 * 30 * by_name["up"]["bytes"] // 4


def test_model_sizes_measures_memory_and_speed(model: Path) -> None:
    options = {"backend": "numpy", "num_threads": 1, "enable_prefix_caching": False}
    point = model_sizes.measure(model, options, seed=7, scale=8)
    assert point["parameters"] == load_config(model).num_parameters
    assert point["decode_tokens_per_s"] > 0
    assert point["prefill_tokens_per_s"] > 0
    machine = {"cpu": "a CPU", "nanovllm": "0"}
    record = {"benchmark": "sizes", "points": [{"size": "tiny", "type": "float32", **point}]}
    shown = table.markdown(
        {**record, "date": "2026-01-01", "machine": machine, "threads": 1, "seed": 7}
    )
    assert "| tiny | 0M | float32 |" in shown


def test_http_cost_compares_the_same_tokens(run: Run) -> None:
    record = run(http_cost.main, "--rounds", 2)
    ways = record["classes"]["float32"]
    assert list(ways) == ["nanovllm", http_cost.WHOLE, http_cost.STREAMS]
    for figures in ways.values():
        assert figures["tokens_per_s"] > 0
        assert len(figures["costs"]) == 2
    assert all(ways[way]["client_share"] > 0 for way in (http_cost.WHOLE, http_cost.STREAMS))


def test_the_cost_is_the_loss_against_the_engine_in_the_same_round() -> None:
    engine = [{"seconds": 1.0}, {"seconds": 2.0}, {"seconds": 1.0}]
    turns = [
        {"seconds": 1.25, "client_seconds": 0.125},
        {"seconds": 2.5, "client_seconds": 0.25},
        {"seconds": 4.0, "client_seconds": 0.4},
    ]
    figures = http_cost.figures_of(turns, engine, 100)
    assert figures == {
        "tokens_per_s": 40.0,
        "cost": pytest.approx(0.2),
        "costs": pytest.approx([0.2, 0.2, 0.75]),
        "client_share": pytest.approx(0.1),
    }


def test_a_made_model_answers_with_every_token(model: Path) -> None:
    llm = LLM(model, backend="numpy")
    output = llm.generate(
        [[299, 0, 5]],
        SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
        use_tqdm=False,
    )[0]
    assert len(output.outputs[0].token_ids) == 4
    assert len({llm.tokenizer.decode([token]) for token in range(256, 299)}) == 43


def test_sizes_are_those_of_gpt2() -> None:
    def parameters(size: str) -> int:
        return read_config(
            {"model_type": "gpt2", "vocab_size": 50257, **SIZES[size]}
        ).num_parameters

    assert {size: round(parameters(size) / 1e6) for size in SIZES} == {
        "gpt2": 124,
        "gpt2-medium": 355,
        "gpt2-large": 774,
        "gpt2-xl": 1558,
    }


def test_sizes_of_the_llama_family_are_those_published() -> None:
    assert {size: read_config(raw).num_parameters for size, raw in LLAMA_SIZES.items()} == {
        "smollm2-135m": 134_515_008,
        "qwen3-0.6b": 596_049_920,
        "llama-3.2-1b": 1_235_814_400,
    }


@pytest.mark.parametrize("size", LLAMA_SIZES)
def test_a_model_of_the_llama_family_runs_and_spells_every_token(tmp_path: Path, size: str) -> None:
    folder = make_model(
        tmp_path, size, vocab_size=66_000, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with LLM(str(folder), backend="numpy", max_model_len=32) as llm:
        (output,) = llm.generate([[1, 65_999]], SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 2
        triples = {llm.tokenizer.token_bytes(token) for token in range(256 + 256**2, 65_999)}
        assert {len(triple) for triple in triples} == {3}
        assert len(triples) == 65_999 - 256 - 256**2


def test_tables_go_between_their_markers(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- compare: begin -->\nold\n<!-- compare: end -->\nafter\n"
        "<!-- soak: begin -->\n<!-- soak: end -->\n",
        encoding="utf-8",
    )
    run(compare.main, *COMPARE)
    for _ in range(2):
        assert table.main([str(tmp_path / "figures.json"), "--write", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(
        "before\n<!-- compare: begin -->\n\n| | decode1 | prefill512 | serve32 |\n"
    )
    assert text.count("| **float32**: nanovllm |") == 1
    assert "old" not in text
    assert "after" in text
    with pytest.raises(ValueError, match="no markers for roofline"):
        table.insert(text, "roofline", "")


def test_the_page_has_a_place_for_each_table(run: Run, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "maintainers" / "measurements.md").read_text(
        encoding="utf-8"
    )
    for program, flags in (
        (compare.main, COMPARE),
        (roofline.main, ROOFLINE),
        (engine_soak.main, ("--minutes", 0.01)),
    ):
        record = run(program, *flags)
        assert table.markdown(record) in table.insert(
            page, record["benchmark"], table.markdown(record)
        )
