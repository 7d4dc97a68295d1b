"""The times of a step: by operation, by thread, and in steps of a real engine."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.cli.bench.offline import Bench, Job
from nanovllm.cli.bench.step_times import PYTHON, StepTimes, operation_names, time_steps
from nanovllm.config import EngineConfig
from nanovllm.model.kernels.backend import NumbaBackend
from tests.support.checkpoints import write_tiny_model

MS = 1_000_000
PROMPTS = [Job("prompt", [1 + index, 2, 3, 4, 5], 6) for index in range(3)]


def step_of(*moments: list[list[int]]) -> StepTimes:
    """Return a step from 1 to 21 ms; `moments` are those of each operation's threads in ms."""
    names = ("qkv", "attention", "qkv")[: len(moments)]
    times = np.array(moments, dtype=np.int64) * MS
    return StepTimes(MS, 21 * MS, names, times, tokens=2, rows=2, keys=9)


def test_times_are_added_up_by_operation_and_by_thread() -> None:
    step = step_of([[2, 5, 6], [2, 6, 6]], [[6, 8, 10], [6, 10, 10]], [[12, 14, 15], [11, 15, 15]])
    totals = step.by_operation()
    assert list(totals) == ["qkv", "attention", PYTHON], "a layer's operations are added up"
    assert totals["qkv"] == pytest.approx((0.007, 0.001))
    assert totals["attention"] == pytest.approx((0.004, 0.001))
    assert totals[PYTHON] == pytest.approx((0.009, 0.0)), "the rest of 20 ms"
    assert step.by_thread() == [pytest.approx((0.007, 0.004)), pytest.approx((0.012, 0.0))]


def test_a_thread_that_comes_too_late_waits_nowhere() -> None:
    step = step_of([[2, 5, 6], [0, 0, 0]], [[6, 8, 10], [9, 10, 0]])
    assert step.by_operation()["qkv"] == pytest.approx((0.004, 0.001))
    assert step.by_operation()["attention"] == pytest.approx((0.004, 0.002))
    assert step.by_thread()[1] == pytest.approx((0.001, 0.0))


@pytest.mark.parametrize("types", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_each_operation_of_a_step_has_its_times(tiny_model: Path, types: dict[str, str]) -> None:
    config = EngineConfig(**types, num_threads=2, enable_prefix_caching=False)  # type: ignore[arg-type]
    bench = Bench.load(str(tiny_model), config, temperature=0.0)
    backend = bench.engine.runner.backend
    assert isinstance(backend, NumbaBackend)
    names = [*operation_names(backend)["forward"], *operation_names(backend)["greedy"]]
    for is_prefill, tokens, keys in ((True, 15, [15] * 9), (False, 3, [18, 21, 24, 27, 30] * 2)):
        steps = time_steps(bench, PROMPTS, 7, is_prefill=is_prefill)
        assert len(steps) == 7
        assert [step.keys for step in steps] == keys[2:9], "the prompts and the tokens so far"
        for step in steps:
            assert (step.tokens, step.rows) == (tokens, 3)
            assert list(step.operations) == names
            ordered = step.moments[:, 0].ravel()  # of the caller's thread
            assert step.started_ns <= ordered[0]
            assert ordered[-1] <= step.ended_ns
            assert (np.diff(ordered) >= 0).all()
            assert sum(taken_s for taken_s, _ in step.by_operation().values()) == pytest.approx(
                step.seconds
            )
            assert all(taken_s > 0 for taken_s, _ in step.by_operation().values())
    bench.engine.close()


def test_keys_before_a_window_are_not_read_by_decoding(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, config={"model_type": "mistral", "sliding_window": 7})
    bench = Bench.load(str(folder), EngineConfig(enable_prefix_caching=False), temperature=0.0)
    for is_prefill, keys in ((True, [15] * 4), (False, [21] * 3 + [18])):
        steps = time_steps(bench, PROMPTS, 4, is_prefill=is_prefill)
        assert [step.keys for step in steps] == keys
    bench.engine.close()


def test_the_times_change_no_token(tiny_model: Path) -> None:
    config = EngineConfig(num_threads=2, enable_prefix_caching=False)
    bench = Bench.load(str(tiny_model), config, temperature=0.0)

    def tokens() -> list[tuple[int, ...]]:
        prompts = [bench.process(job) for job in PROMPTS]
        for _ in bench.engine.run(prompts):
            pass
        return [tuple(prompt.output().outputs[0].token_ids) for prompt in prompts]

    before = tokens()
    assert len(time_steps(bench, PROMPTS, 3, is_prefill=False)) == 3
    assert tokens() == before
    bench.engine.close()


def test_sequences_that_never_run_together_are_refused(tiny_model: Path) -> None:
    config = EngineConfig(max_num_seqs=2, enable_prefix_caching=False)
    bench = Bench.load(str(tiny_model), config, temperature=0.0)
    with pytest.raises(ValueError, match="3 sequences do not run in one step; lower --batch-size"):
        time_steps(bench, PROMPTS, 1, is_prefill=False)
    bench.engine.close()
