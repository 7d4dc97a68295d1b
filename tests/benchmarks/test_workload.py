"""The workloads have their shapes, and differ by seed."""

import pytest

from benchmarks.workload import WORKLOADS, Answer, make_workloads


@pytest.mark.parametrize("seed", [7, 8])
def test_shapes_are_those_of_the_names(seed: int) -> None:
    works = make_workloads(50257, seed)
    assert tuple(works) == WORKLOADS
    decode, prefill, serve = works.values()
    assert ([len(prompt) for prompt in decode.prompts], decode.lengths, decode.tokens) == (
        [16],
        [129],
        128,
    )
    assert ([len(prompt) for prompt in prefill.prompts], prefill.lengths, prefill.tokens) == (
        [512],
        [1],
        512,
    )
    assert len(serve.prompts) == len(serve.lengths) == 32
    assert all(32 <= len(prompt) <= 256 for prompt in serve.prompts)
    assert all(32 <= length <= 128 for length in serve.lengths)
    assert serve.tokens == sum(serve.lengths)
    assert all(
        0 <= token < 50257 for work in works.values() for prompt in work.prompts for token in prompt
    )


def test_the_seed_draws_the_requests() -> None:
    assert make_workloads(1000, 3) == make_workloads(1000, 3)
    assert make_workloads(1000, 3)["serve32"] != make_workloads(1000, 4)["serve32"]


def test_a_scale_makes_all_of_it_small() -> None:
    works = make_workloads(300, scale=8)
    assert (
        max(
            len(prompt) + length
            for work in works.values()
            for prompt, length in zip(work.prompts, work.lengths, strict=True)
        )
        <= 65
    )
    assert len(works["serve32"].prompts) == 4


def test_decoding_is_timed_without_the_first_token() -> None:
    asked = []

    def run(prompts: list[list[int]], lengths: list[int]) -> Answer:
        asked.append(lengths)
        return {"seconds": 0.5 + 0.01 * (lengths[0] - 1), "token_ids": []}

    works = make_workloads(300)
    seconds, _ = works["decode1"].run(run)
    assert seconds == pytest.approx(128 * 0.01)
    assert asked == [[129], [1]]
    assert works["prefill512"].run(run)[0] == pytest.approx(0.5)
