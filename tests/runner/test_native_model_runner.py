"""NativeModelRunner: one forward pass, and logits only for the rows that need them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanovllm.config import BACKENDS
from nanovllm.errors import CheckpointError
from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.model.logprobs import token_logprobs
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.model.weights import ModelWeights
from nanovllm.runner.native_model_runner import PROMPT_ROWS_AT_ONCE, NativeModelRunner, RunnerOutput
from tests.support.batches import make_batch
from tests.support.sampling import Row, make_step

BLOCK_SIZE = 8


class CountingBackend(NumpyBackend):
    """The NumPy backend with a cache full of NaN, which counts the rows of each call."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        super().__init__(config, weights, batch_invariant=True)
        self.forwards: list[int] = []
        self.logit_rows: list[int] = []
        self.greedy_rows: list[int] = []
        self.allocate_cache(40, BLOCK_SIZE)
        self.fill_blocks(list(range(40)), float("nan"))

    def forward(self, batch: ForwardBatch) -> np.ndarray:
        self.forwards.append(len(batch.logit_rows))
        return super().forward(batch)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        self.logit_rows.append(len(hidden))
        return super().logits(hidden)

    def greedy(self, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.greedy_rows.append(len(hidden))
        return super().greedy(hidden)


@pytest.fixture
def backend(tiny_model: Path) -> CountingBackend:
    config = load_config(tiny_model)
    return CountingBackend(config, load_weights(tiny_model, config))


def prompt_of(length: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, length)]


def all_logits(tiny_model: Path, prompt: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] after every token, computed by another backend of the same kind."""
    backend = NumpyBackend.load(tiny_model, LoadOptions(batch_invariant=True))
    backend.allocate_cache(40, BLOCK_SIZE)
    return backend.logits(
        backend.forward(make_batch([prompt], block_size=BLOCK_SIZE, all_rows=True))
    )


def rows_of(batch: ForwardBatch, logit_rows: list[int]) -> ForwardBatch:
    return replace(batch, logit_rows=np.array(logit_rows, dtype=np.int64))


def test_only_rows_that_are_sampled_or_reported_get_logits(backend: CountingBackend) -> None:
    prompts = [prompt_of(60, 1), prompt_of(3, 2), prompt_of(1, 3)]
    output = NativeModelRunner(backend).run(
        make_batch(prompts, block_size=BLOCK_SIZE), *make_step([Row()] * 3)
    )
    assert (backend.forwards, backend.logit_rows) == ([3], [3])
    assert len(output.token_ids) == 3
    assert output.logprobs == [None] * 3
    assert output.prompt_logprobs == []


def test_a_step_that_samples_nothing_computes_no_logits(backend: CountingBackend) -> None:
    batch = rows_of(make_batch([prompt_of(60, 1)], block_size=BLOCK_SIZE), [])
    assert NativeModelRunner(backend).run(batch, *make_step([])) == RunnerOutput([], [], [])
    assert (backend.forwards, backend.logit_rows) == ([0], [])


def test_plain_greedy_steps_are_the_backends_and_mixed_ones_read_the_head_once(
    backend: CountingBackend, tiny_model: Path
) -> None:
    prompts = [prompt_of(9, 1), prompt_of(3, 2)]
    best = [int(all_logits(tiny_model, prompt)[-1].argmax()) for prompt in prompts]
    greedy = Row(temperature=0.0)
    runner = NativeModelRunner(backend)
    assert (
        runner.run(
            make_batch(prompts, block_size=BLOCK_SIZE), *make_step([greedy, greedy])
        ).token_ids
        == best
    )
    assert (backend.greedy_rows, backend.logit_rows) == ([2], [2])
    for other in (
        Row(),
        Row(temperature=0.0, logprobs=0),
        Row(temperature=0.0, bias={3: 1.0}),
        Row(temperature=0.0, presence=1.0, output=[3]),
    ):
        assert (
            runner.run(
                make_batch(prompts, block_size=BLOCK_SIZE), *make_step([greedy, other])
            ).token_ids[0]
            == best[0]
        )
    assert (backend.greedy_rows, backend.logit_rows) == ([2], [2, 2, 2, 2, 2])


def test_both_backends_sample_the_same_tokens_and_report_the_same(tiny_model: Path) -> None:
    prompts = [prompt_of(5 + place, place) for place in range(9)]
    rows = [
        Row(temperature=0.0),
        Row(seed=1, logprobs=0),
        Row(seed=2, top_k=9, logprobs=4),
        Row(seed=3, top_p=0.7),
        Row(seed=4, min_p=0.3),
        Row(seed=5, repetition=1.5, output=prompts[5]),
        Row(seed=6, bias={4: 50.0}),
        Row(seed=7, allowed=[8, 9], logprobs=1),
        Row(temperature=0.0, logprobs=300),
    ]
    outputs = []
    for name in ("numpy", "numba"):
        runner = NativeModelRunner.load(tiny_model, backend=name)
        runner.backend.allocate_cache(40, BLOCK_SIZE)
        batch = make_batch(prompts, block_size=BLOCK_SIZE)
        whole = rows_of(
            batch, [*range(4), *batch.logit_rows.tolist()]
        )  # four tokens of the first prompt are reported
        outputs.append(
            runner.run(
                whole,
                *make_step(
                    rows, sampled=range(4, 13), prompt=(range(4), prompts[0][1:5], [0, 1, 2, 300])
                ),
            )
        )
    slow, fast = outputs
    assert fast.token_ids == slow.token_ids
    for actual, expected in zip(
        [*fast.logprobs, *fast.prompt_logprobs],
        [*slow.logprobs, *slow.prompt_logprobs],
        strict=True,
    ):
        assert (actual is None) == (expected is None)
        if actual is not None and expected is not None:
            assert (actual.token_ids[0], len(actual.token_ids)) == (
                expected.token_ids[0],
                len(expected.token_ids),
            )
            np.testing.assert_allclose(actual.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_prompt_rows_are_taken_in_slices(backend: CountingBackend, tiny_model: Path) -> None:
    """100 rows of a real vocabulary would be 20 MB of logits, and twice that in the softmax."""
    prompt = prompt_of(101, 4)
    batch = make_batch([prompt], block_size=BLOCK_SIZE, all_rows=True)
    counts = [place % 4 for place in range(100)]
    step = make_step(
        [Row(logprobs=2, temperature=0.0)], sampled=[100], prompt=(range(100), prompt[1:], counts)
    )
    output = NativeModelRunner(backend).run(batch, *step)
    assert max(backend.logit_rows) <= PROMPT_ROWS_AT_ONCE
    assert sum(backend.logit_rows) == 101
    logits = all_logits(tiny_model, prompt)
    assert output.prompt_logprobs == token_logprobs(
        logits[:100], np.array(prompt[1:], dtype=np.int64), np.array(counts, dtype=np.int64)
    )
    best = logits[100].argmax(keepdims=True)
    assert output.token_ids == best.tolist()
    assert output.logprobs == token_logprobs(logits[100:], best, np.array([2], dtype=np.int64))


def test_rows_of_several_sequences_keep_their_places(
    backend: CountingBackend, tiny_model: Path
) -> None:
    prompts = [prompt_of(9, 5), prompt_of(12, 6), prompt_of(4, 7)]
    batch = rows_of(
        make_batch(prompts, block_size=BLOCK_SIZE), [2, 3, 8, 20, 24]
    )  # two prompt rows of the first, then each one's last
    rows = [
        Row(temperature=0.0, logprobs=1),
        Row(temperature=0.0),
        Row(temperature=0.0, logprobs=0),
    ]
    step = make_step(rows, sampled=[2, 3, 4], prompt=([0, 1], prompts[0][3:5], [1, 0]))
    output = NativeModelRunner(backend).run(batch, *step)
    logits = [all_logits(tiny_model, prompt) for prompt in prompts]
    assert output.token_ids == [int(row_logits[-1].argmax()) for row_logits in logits]
    assert [logprobs and len(logprobs.token_ids) for logprobs in output.logprobs] == [2, None, 1]
    assert [logprobs.token_ids[0] for logprobs in output.prompt_logprobs] == prompts[0][3:5]
    expected = token_logprobs(
        logits[0][2:4], np.array(prompts[0][3:5], dtype=np.int64), np.array([1, 0], dtype=np.int64)
    )
    assert output.prompt_logprobs == expected


def test_log_probabilities_are_those_of_the_model_before_all_settings(
    backend: CountingBackend, tiny_model: Path
) -> None:
    prompt = prompt_of(9, 8)
    logits = all_logits(tiny_model, prompt)[-1]
    best = int(logits.argmax())
    row = Row(
        temperature=0.1,
        top_k=3,
        repetition=9.0,
        output=prompt,
        bias={best: float("-inf")},
        logprobs=5,
    )
    output = NativeModelRunner(backend).run(
        make_batch([prompt], block_size=BLOCK_SIZE), *make_step([row])
    )
    (report,) = output.logprobs
    assert report is not None
    (token,) = output.token_ids
    assert token != best
    assert token is not None
    expected = token_logprobs(
        logits[None], np.array([token], dtype=np.int64), np.array([5], dtype=np.int64)
    )
    assert report == expected[0]
    assert report.token_ids[1] == best


def test_a_row_without_a_token_says_so_and_the_others_go_on(backend: CountingBackend) -> None:
    prompts = [prompt_of(5, 9), prompt_of(6, 10)]
    forbidden = Row(bias=dict.fromkeys(range(backend.config.vocab), float("-inf")), logprobs=1)
    output = NativeModelRunner(backend).run(
        make_batch(prompts, block_size=BLOCK_SIZE), *make_step([forbidden, Row(logprobs=1)])
    )
    assert output.token_ids[0] is None
    assert output.token_ids[1] is not None
    assert output.logprobs[1] is not None


def test_a_network_that_is_not_a_number_has_no_token(tiny_model: Path) -> None:
    config = load_config(tiny_model)
    weights = load_weights(tiny_model, config)
    broken = np.array(weights.position_embedding)
    broken[2:] = np.nan
    backend = CountingBackend(config, replace(weights, position_embedding=broken))
    batch = make_batch([[1, 2], [1, 2, 3], [4]], block_size=BLOCK_SIZE, all_rows=True)
    step = make_step(
        [Row(logprobs=2)] * 3, sampled=[1, 4, 5], prompt=([2, 3, 4], [2, 3, 4], [2, 2, 2])
    )
    with np.errstate(invalid="ignore"):
        output = NativeModelRunner(backend).run(batch, *step)
    assert [token is None for token in output.token_ids] == [False, True, False]
    assert [
        bool(np.isfinite(logprobs.logprobs).all())
        for logprobs in output.logprobs
        if logprobs is not None
    ] == [True, False, True]
    assert [bool(np.isfinite(logprobs.logprobs).all()) for logprobs in output.prompt_logprobs] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("name", BACKENDS)
def test_loading_by_name(tiny_model: Path, tmp_path: Path, name: str) -> None:
    runner = NativeModelRunner.load(tiny_model, backend=name)
    assert runner.config == runner.backend.config
    with pytest.raises(CheckpointError, match="config"):
        NativeModelRunner.load(tmp_path, backend=name)
    with pytest.raises(ValueError, match="dtype='float16'"):
        NativeModelRunner.load(tiny_model, backend=name, options=LoadOptions(dtype="float16"))


def test_a_backend_that_does_not_exist_is_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="backend is 'x'; it must be one of numba, numpy"):
        NativeModelRunner.load(tiny_model, backend="x")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("greedy", [True, False])
def test_as_many_sampled_rows_as_hidden_rows_are_not_the_same_rows(
    tiny_model: Path, name: str, *, greedy: bool
) -> None:
    prompts = [prompt_of(5, 1), prompt_of(6, 2), prompt_of(7, 3)]
    row = Row(temperature=0.0) if greedy else Row(temperature=0.0, logprobs=1)
    best = [int(all_logits(tiny_model, prompt)[-1].argmax()) for prompt in prompts]
    runner = NativeModelRunner.load(tiny_model, backend=name)
    runner.backend.allocate_cache(40, BLOCK_SIZE)
    batch = make_batch(prompts, block_size=BLOCK_SIZE)
    for places in ([2, 0, 1], [1, 1, 0]):
        output = runner.run(batch, *make_step([row] * 3, sampled=places))
        assert output.token_ids == [best[place] for place in places]
    reported = ([0, 1, 2], [1, 2, 3], [1, 1, 1])  # of the rows that are sampled too
    output = runner.run(batch, *make_step([row] * 3, prompt=reported))
    assert output.token_ids == best


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids", 10**6),
        ("block_tables", 40),
        ("slots", 10**6),
        ("positions", -1),
        ("logit_rows", 99),
    ],
)
def test_an_index_from_outside_is_refused_before_anything_is_computed(
    backend: CountingBackend, name: str, value: int
) -> None:
    batch = make_batch([prompt_of(5, 11)], block_size=BLOCK_SIZE)
    getattr(batch, name).flat[0] = value
    with pytest.raises(ValueError, match=name):
        NativeModelRunner(backend).run(batch, *make_step([Row()]))
    assert backend.logit_rows == []
