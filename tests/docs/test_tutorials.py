"""The numbers and pictures of docs/tutorials are what tools/tutorials computes."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.quantized import quantize_rows
from tools.make_tutorials import TUTORIALS
from tools.tutorials import backpropagation, bits, dynamics, film, models, quantization
from tools.tutorials.pages import Tutorial


@pytest.mark.parametrize("make", TUTORIALS.values(), ids=TUTORIALS)
def test_a_page_shows_what_is_computed(make: Callable[[], Tutorial]) -> None:
    assert make().problems() == []


def test_the_gradients_are_those_of_central_differences() -> None:
    weights = backpropagation.WEIGHTS
    grads = backpropagation.backward(weights, backpropagation.forward(weights))
    for name in [*backpropagation.NAMES, *weights]:
        expected = backpropagation.central_differences(name)
        np.testing.assert_allclose(grads[name], expected, atol=1e-9, err_msg=name)


def test_a_page_with_another_number_has_a_problem() -> None:
    tutorial = Tutorial(
        "first-server.md", {}, ("15 tokens on the moon",), {"terminal.svg": "<svg/>"}
    )
    assert len(tutorial.problems()) == 2
    with pytest.raises(ValueError, match="no part 'moon'"):
        Tutorial("first-server.md", {"moon": ""}).filled()


def test_the_film_has_the_events_that_its_page_tells() -> None:
    frames = film.record()
    events = {frame.step: frame.events for frame in frames if frame.events}
    assert events[4] == ("C is admitted, finds 32 of its tokens cached",)
    assert events[26] == ("no block is free for C; C is preempted, it gives back 7 blocks",)
    assert events[28] == ("A ends and frees blocks 13, 14, 11, 7, 4, 3, 2, 1, 0",)
    assert events[29] == (
        "C is admitted, finds 48 of its tokens cached",
        "D is admitted, finds 32 of its tokens cached",
    )
    assert film.Part("D", 32, 8, samples=True) in frames[28].parts
    assert all(sum(part.count for part in frame.parts) <= film.BUDGET for frame in frames)


def test_the_models_have_as_many_parameters_as_published() -> None:
    assert {model.name: model.num_parameters for model in models.MODELS} == {
        "GPT-2 124M": 124_439_808,
        "SmolLM2 135M": 134_515_008,
        "Qwen2.5 0.5B": 494_032_768,
        "Qwen3 0.6B": 596_049_920,
        "Llama 3.2 1B": 1_235_814_400,
        "Mistral 7B": 7_241_732_096,
    }


def test_a_row_is_quantized_as_by_the_model() -> None:
    codes, scale, zero = quantization.quantize_row(quantization.ROW)
    expected = quantize_rows(quantization.ROW[None].astype(np.float32))
    assert codes.tolist() == expected[0][0].tolist()
    np.testing.assert_allclose(scale, expected[1][0, 0], rtol=1e-6)
    assert zero == expected[2][0, 0]


def test_company_changes_no_bit_of_an_invariant_backend() -> None:
    measured = bits.measure(bits.BACKENDS["numpy, batch_invariant"], max_tokens=2)
    assert measured == {"tokens": 2, "same_tokens": True, "different": 0, "largest": 0.0}


def test_bfloat16_rounds_to_even() -> None:
    assert quantization.bfloat16(1.0 + 2.0**-8) == 1.0
    assert quantization.bfloat16(1.0 + 3 * 2.0**-8) == 1.0 + 2.0**-6


def test_the_recorded_runs_are_what_the_page_tells() -> None:
    runs, entropy = dynamics.load()
    assert runs.keys() == dynamics.COMMANDS.keys()
    for run in runs.values():
        first = run.evaluations[0][2]
        assert first is not None
        assert abs(first - math.log(run.vocab)) < 0.15
    ends = {name: run.evaluations[-1][2] or math.nan for name, run in runs.items()}
    assert ends["good"] < entropy - 0.9
    for name in ("low", "high", "clipped", "exploding"):
        assert entropy < ends[name] < entropy + 0.1, name
    assert ends["memorized"] > ends["good"]
    assert max(row[2] or 0 for row in runs["clipped"].steps) > 20


def test_the_record_of_a_run_keeps_the_first_steps_and_every_fifth(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 3}', encoding="utf-8")
    line = '{{"step": {}, "train_loss": 1.23456, "val_loss": 2.0, "grad_norm": 0.5}}\n'
    steps = "".join(line.format(step) for step in range(41))
    (tmp_path / "steps.jsonl").write_text(steps, encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text(line.format(40), encoding="utf-8")
    run = dynamics.read(tmp_path)
    assert (run.vocab, run.evaluations) == (3, [[40, 1.235, 2.0]])
    assert [row[0] for row in run.steps] == [*range(20), 20, 25, 30, 35, 40]


def test_the_entropy_of_two_equal_letters_is_ln_2() -> None:
    assert dynamics.letter_entropy("abab") == pytest.approx(math.log(2))
