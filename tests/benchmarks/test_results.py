"""Ratios, fractions and agreement follow from the measurements."""

import pytest

from benchmarks.contenders import OURS
from benchmarks.results import NEAR_TIE, Agreement, ClassResults, Sample, compare_outputs
from benchmarks.workload import make_workloads
from nanovllm.cli.bench.roofline import Costs


def results() -> ClassResults:
    found = ClassResults("float32", 1e9, Costs(1000, 2.0, 100, 10, 50), make_workloads(300))
    speeds = {OURS: [30.0, 20.0, 10.0], "fast": [15.0, 20.0, 8.0], "slow": [5.0]}
    found.samples = [
        Sample(name, workload, number, speed, 1e5)
        for name, own in speeds.items()
        for number, speed in enumerate(own)
        for workload in found.workloads
    ]
    found.abouts = {name: {} for name in speeds}
    return found


def test_a_ratio_is_of_runs_of_one_round() -> None:
    found = results()
    assert found.ratios("serve32") == {"fast": 1.25, "slow": 6.0}
    assert found.best_peer("serve32") == ("fast", 1.25)
    assert found.speed(OURS, "serve32") == 20.0
    found.abouts = {OURS: {}}
    assert found.best_peer("serve32") is None


def test_decoding_is_a_share_of_memory_and_reading_one_of_the_peak() -> None:
    found = results()
    seen = sum(range(17, 17 + 128)) / 128
    assert found.share(OURS, "decode1") == pytest.approx(20.0 * (1000 + seen * 2.0) / 1e5)
    operations = 512 * 100 + 512 * 513 // 2 * 10 + 50
    assert found.share(OURS, "prefill512") == pytest.approx(20.0 * operations / 512 / 1e9)
    assert found.share(OURS, "serve32") is None
    found.peak = None
    assert found.share(OURS, "prefill512") is None


def test_notes_name_missing_contenders_and_agreement() -> None:
    found = results()
    found.problems["vllm float32"] = "not installed: No module named 'vllm'"
    found.agreements["fast"] = {"decode1": Agreement(4, 2, 1, 1, 0.75)}
    text = "\n".join(found.notes())
    assert "vllm float32: not installed" in text
    assert (
        "fast: 2 of 4 outputs are ours, 1 differ after a near tie, 1 elsewhere; "
        "75% of the tokens come before that" in text
    )
    record = found.record()
    assert record["contenders"][OURS]["workloads"]["serve32"]["tokens_per_s"]["all"] == [
        30.0,
        20.0,
        10.0,
    ]
    assert record["best_peer"]["decode1"] == ("fast", 1.25)


def test_answers_may_part_at_a_near_tie() -> None:
    wide, narrow = 100 * NEAR_TIE, NEAR_TIE / 2
    ours = [[1, 2, 3, 4]] * 4
    theirs = [[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 9, 4], [1, 2, 9, 9]]
    gaps = [[wide] * 4, [wide, wide, narrow, wide], [wide] * 4, [wide, wide, wide, narrow]]
    assert compare_outputs(ours, theirs, gaps) == Agreement(
        requests=4, equal=1, near_tie=1, different=2, equal_tokens=10 / 16
    )
