"""The benchmark of the peers' speculative decoding runs ours on tiny models; its table is right."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speculation_peers, table
from benchmarks.contenders import OURS, Contender, WorkerError
from benchmarks.speculation_peers import PLAIN, Case, Key, summarize
from tests.support.checkpoints import write_tiny_model

ENGINE = {"backend": "numpy", "batch_invariant": True, "kv_cache_memory": "16MiB"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a run of ours on tiny models."""
    folder = tmp_path_factory.mktemp("speculation")
    target = write_tiny_model(folder / "target")
    draft = write_tiny_model(folder / "draft", seed=1, config={"n_embd": 16, "n_layer": 1})
    options = {
        "--model": target, "--draft-model": draft, "--repeats-model": target, "--factors": "2,3",
        "--models": folder / "wide", "--ours": json.dumps(ENGINE), "--scale": 40, "--threads": 1,
        "--classes": "float32", "--rounds": 2, "--methods": "ngram",
    }  # fmt: skip
    return [str(part) for option in options.items() for part in option]


def test_ours_runs_each_case_and_a_missing_peer_is_a_problem(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    systems = ["--systems", f"{OURS},vllm", "--peer-python", str(tmp_path / "no-python")]
    assert speculation_peers.main([*flags, *systems, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(printed.splitlines()[-1]) == record
    assert record["problems"].keys() == {"vllm none, float32", "vllm ngram, float32"}
    assert "cannot be run" in record["problems"]["vllm ngram, float32"]
    cases = [(one["workload"], one["streams"], one["temperature"]) for one in record["results"]]
    names = ("prose", "repeats")
    assert sorted(cases) == [(w, n, t) for w in names for n in (1, 4) for t in (0.0, 0.8)]
    for one in record["results"]:
        assert (one["system"], one["method"]) == (OURS, "ngram")
        assert (one["changed"], one["outputs"]) == (0, 2 * one["streams"])
        assert all(turns["plain"]["tokens"] > 0 for turns in one["rounds"])


def test_a_contender_that_fails_is_closed_and_left_out(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, close = Contender.ask, Contender.close
    closed: list[str] = []

    def fail(contender: Contender, *args: Any, **more: Any) -> Any:
        if contender.entry.name.endswith("ngram") and more["temperature"]:
            raise WorkerError("out of memory")
        return ask(contender, *args, **more)

    def close_and_note(contender: Contender) -> None:
        closed.append(contender.entry.name)
        close(contender)

    monkeypatch.setattr(Contender, "ask", fail)
    monkeypatch.setattr(Contender, "close", close_and_note)
    file = tmp_path / "figures.json"
    some = ["--systems", OURS, "--workloads", "prose", "--streams", "1", "--json", str(file)]
    assert speculation_peers.main([*flags, *some]) == 1
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["problems"] == {f"{OURS} ngram, float32": "out of memory"}
    assert [one["temperature"] for one in record["results"]] == [0.0]
    assert f"{OURS} ngram" in closed


def test_a_system_that_cannot_draft_at_a_temperature_is_left_out_there(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = speculation_peers.start

    def start_limited(*args: Any) -> Contender | None:
        contender = start(*args)
        assert contender is not None
        contender.about["greedy_only"] = "no temperatures"
        return contender

    monkeypatch.setattr(speculation_peers, "start", start_limited)
    file = tmp_path / "figures.json"
    some = ["--systems", OURS, "--workloads", "prose", "--streams", "1", "--json", str(file)]
    speculation_peers.main([*flags, *some])
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["problems"] == {f"{OURS}, temperature 0.8": "no temperatures"}
    assert [one["temperature"] for one in record["results"]] == [0.0]


def answer(token_ids: list[list[int]], seconds: float = 1.0, **drafts: int) -> dict[str, Any]:
    tokens = sum(map(len, token_ids)) - len(token_ids)
    counts = {"drafted": 0, "accepted": 0, **drafts}
    return {"token_ids": token_ids, "seconds": seconds, "tokens": tokens, **counts}


def results(streams: int = 2, temperature: float = 0.0) -> list[dict[str, Any]]:
    """Return the figures of two rounds, in the second of which drafts change an output."""
    ours: Key = (OURS, PLAIN)
    first, second = [[1, 2], [3, 4]], [[1, 2], [3, 5]]
    rounds: list[dict[Key, Any]] = [
        {
            ("vllm", "ngram"): answer(drafted, seconds=0.5, drafted=10, accepted=8),
            ("vllm", PLAIN): answer(first),
            ours: answer(other),
            ("llamacpp", "draft"): answer(first),
        }
        for drafted, other in ((first, first), (second, second))
    ]
    return list(summarize(Case("float32", "prose", streams, temperature), rounds))


def test_outputs_that_drafts_changed_are_counted_and_ratios_need_a_run_without_drafts() -> None:
    (one,) = results()
    assert (one["system"], one["method"], one["ratio"]["all"]) == ("vllm", "ngram", [2.0, 2.0])
    assert (one["changed"], one["outputs"], one["plain_unlike_ours"]) == (1, 4, 1)
    assert (one["drafted"], one["accepted"]) == (20, 16)


def test_the_table_has_ratios_then_what_was_accepted_and_changed() -> None:
    record = {
        "benchmark": "speculation-peers", "date": "2026-01-02T03:04:05", "threads": 2, "seed": 7,
        "machine": {"cpu": "a CPU", "nanovllm": "0"},
        "problems": {"vllm draft, float32": "not supported"},
        "results": [*results(), *results(temperature=0.8)],
    }  # fmt: skip
    text = table.markdown(record)
    assert text.splitlines() == [
        "| | vllm, ngram |",
        "|---|---|",
        "| float32, prose, 2 at once, greedy | **2.00** (4) |",
        "| float32, prose, 2 at once, temperature 0.8 | **2.00** (4) |",
        "",
        "| | accepted, prose | changed outputs, greedy | changed outputs, drawn |",
        "|---|---|---|---|",
        "| vllm, ngram | 80% of 40 | 25% of 4 | 25% of 4 |",
        "",
        "vllm draft, float32: not supported",
        "",
        "2026-01-02, a CPU, 2 threads, seed 7, nanovllm 0",
    ]
    page = Path(__file__).parents[2] / "docs" / "maintainers" / "measurements.md"
    assert text in table.insert(page.read_text(encoding="utf-8"), "speculation-peers", text)
