"""The benchmark of speculative decoding runs each workload on tiny models; its table is right."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speculation, speculation_work, table
from benchmarks.speculation import Turn
from benchmarks.speculation_work import Prompts
from nanovllm.engine.engine import Engine
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.families.registry import load_config
from nanovllm.sampling_params import SamplingParams
from tests.support.checkpoints import write_tiny_model
from tests.support.speculation import draft_always

OURS = {"backend": "numpy", "batch_invariant": True, "kv_cache_memory": "16MiB"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speculation")


@pytest.fixture(scope="module")
def flags(folder: Path) -> list[str]:
    """The options of a run on tiny models, which are kept."""
    target = write_tiny_model(folder / "target")
    draft = write_tiny_model(folder / "draft", seed=1, config={"n_embd": 16, "n_layer": 1})
    options = {
        "--model": target, "--draft-model": draft, "--repeats-model": target, "--factors": "2,3",
        "--models": folder / "wide", "--ours": json.dumps(OURS), "--scale": 40, "--threads": 1,
        "--classes": "float32",
    }  # fmt: skip
    return [str(part) for option in options.items() for part in option]


@pytest.fixture
def _drafts_always(monkeypatch: pytest.MonkeyPatch) -> None:
    load = speculation.load
    monkeypatch.setattr(speculation, "load", lambda *args: draft_always(load(*args)))


@pytest.mark.usefixtures("_drafts_always")
def test_each_workload_runs_with_and_without_a_draft_model(
    flags: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "figures.json"
    arguments = [*flags, "--rounds", "2", "--streams", "1,5", "--methods", "ngram,both"]
    assert speculation.main([*arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(printed.splitlines()[-1]) == record
    assert "| float32, json, 1 at once, temperature 0.8 | " in printed
    assert record["models"].keys() == {"trained", "repeats", "random"}
    keys = ("method", "workload", "streams", "temperature")
    found = {tuple(one[key] for key in keys): one for one in record["results"]}
    streams = {"prose": (1, 5), "repeats": (1,), "json": (1,), "random": (1,)}
    assert found.keys() == {
        (method, workload, number, temperature)
        for method in ("ngram", "both")
        for workload, numbers in streams.items()
        for number in numbers
        for temperature in (0.0, 0.8)
    }
    for one in found.values():
        assert len(one["ratio"]["all"]) == len(one["rounds"]) == 2
        assert all(turns["plain"]["drafted"] == 0 for turns in one["rounds"])
        assert all(
            turns["plain"]["tokens"] == turns["drafts"]["tokens"] > 0 for turns in one["rounds"]
        )
        assert one["accepted"] <= one["drafted"]
    assert found["both", "prose", 1, 0.0]["drafted"] > 0
    lines = [line for line in printed.splitlines() if "drafted tokens accepted" in line]
    assert len(lines) == len(found)


def test_without_a_folder_the_wide_models_are_removed(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = flags.index("--models")
    arguments = [*flags[:place], *flags[place + 2 :], "--workloads", "prose", "--methods", "ngram"]
    file = tmp_path / "figures.json"
    assert speculation.main([*arguments, "--streams", "1", "--json", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["results"]
    assert list(tmp_path.iterdir()) == [file]


def test_wide_models_are_kept_and_made_again_when_the_weights_change(
    flags: list[str], folder: Path, tmp_path: Path
) -> None:
    target, draft = folder / "target", folder / "draft"
    make = speculation_work.make_pairs
    first = make({"trained": target, "random": target}, (2, 3), draft, tmp_path, seed=7)
    config, random = (load_config(first[name].target) for name in ("trained", "random"))
    assert (config.d_model, random.d_model, random.heads) == (64, 64, config.heads)
    assert load_config(first["random"].draft).d_model == 48
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make({"trained": target, "random": target}, (2, 3), draft, tmp_path, seed=7) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == made
    other = write_tiny_model(tmp_path / "target", seed=5)
    changed = make({"trained": other}, (2, 3), draft, tmp_path, seed=7)
    assert changed["trained"].target != first["trained"].target


@pytest.mark.parametrize("logprobs", [0, None], ids=["before the rounds", "in a round"])
def test_another_output_with_drafts_is_an_error(
    flags: list[str], logprobs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = speculation.run

    def damaged(engine: Engine, prompts: Prompts, params: SamplingParams) -> Any:
        turn, outputs = run(engine, prompts, params)
        damage = int(params.speculative and params.logprobs == logprobs)
        return turn, [
            ([token_ids[0] + damage, *token_ids[1:]], bits) for token_ids, bits in outputs
        ]

    monkeypatch.setattr(speculation, "run", damaged)
    arguments = [*flags, "--workloads", "prose", "--methods", "draft", "--streams", "1"]
    with pytest.raises(RuntimeError, match=r"draft, prose, 1 at once, greedy: .* differs"):
        speculation.main(arguments)


def test_workloads_without_their_needs_are_skipped(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed = speculation.parse(["--workloads", "prose,repeats"])
    assert parsed.workloads == ["prose"]
    assert "repeats is skipped: it needs --repeats-model" in capsys.readouterr().err
    for wrong in (["--workloads", "repeats"], ["--factors", "4"], ["--streams", "0"]):
        with pytest.raises(SystemExit):
            speculation.parse(wrong)


def test_prompts_of_a_file_and_passages_that_begin_again(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    (passage, *_) = speculation_work.make_prompts("repeats", tokenizer, seed=7, scale=1)
    text = tokenizer.decode(passage)
    begin, end = text.split("\n\n")[0], text.rsplit("\n\n", 1)[1]
    assert end
    assert begin.startswith(end)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc"}\n{"prompt": [1, 2]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: the prompt must be text"):
        speculation_work.make_prompts("repeats", tokenizer, seed=7, scale=1, file=file)
    file.write_text('{"prompt": "abc"}\n', encoding="utf-8")
    assert speculation_work.make_prompts("repeats", tokenizer, seed=7, scale=1, file=file) == [
        tokenizer.encode("abc")
    ]


def recorded(**changes: Any) -> dict[str, Any]:
    """Return the record of one case of three rounds."""
    plain = Turn(tokens=100, seconds=1.0, drafted=0, accepted=0)
    rounds = [
        {True: Turn(100, seconds, drafted=20, accepted=15), False: plain}
        for seconds in (0.5, 0.4, 2.0)
    ]
    case = {"type": "float32", "method": "ngram", "workload": "prose", "streams": 1}
    return {**case, "temperature": 0.0, **speculation.figures_of(rounds), **changes}


def test_the_ratio_is_the_median_within_rounds() -> None:
    figures = recorded()
    assert figures["ratio"]["all"] == [2.0, 2.5, 0.5]
    assert figures["ratio"]["median"] == 2.0
    assert (figures["tokens_per_s"], figures["plain_tokens_per_s"]) == (200.0, 100.0)
    assert (figures["drafted"], figures["accepted"]) == (60, 45)


def test_the_table_has_a_row_for_each_workload_and_a_column_for_each_method() -> None:
    record = {
        "benchmark": "speculation", "date": "2026-01-02T03:04:05", "threads": 2, "seed": 7,
        "machine": {"cpu": "a CPU", "nanovllm": "0"},
        "results": [
            recorded(),
            recorded(method="draft", drafted=0, accepted=0, plain_tokens_per_s=300.0),
            recorded(streams=32, temperature=0.8, drafted=2000, accepted=500),
        ],
    }  # fmt: skip
    text = table.markdown(record)
    assert text.splitlines() == [
        "| | tokens/s without drafts | ngram | draft |",
        "|---|---|---|---|",
        "| float32, prose, 1 at once, greedy | 200 | **2.00** (75% of 60) | **2.00** (no drafts) |",
        "| float32, prose, 32 at once, temperature 0.8 | 100 | **2.00** (25% of 2,000) | - |",
        "",
        "2026-01-02, a CPU, 2 threads, seed 7, nanovllm 0",
    ]
    page = Path(__file__).parents[2] / "docs" / "maintainers" / "measurements.md"
    assert text in table.insert(page.read_text(encoding="utf-8"), "speculation", text)
