"""The names of the package: exports, settings with advice, and SamplingParams."""

import pickle
from typing import Any

import numpy as np
import pytest

import nanovllm
from nanovllm import LLM, InvalidRequestError, SamplingParams


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        (
            "gpu_memory_utilization",
            "runs on the CPU, in one process; leave it out, and set kv_cache_memory",
        ),
        ("tensor_parallel_size", "leave it out, and set num_threads"),
        ("enforce_eager", "leave it out, there are no CUDA graphs"),
        ("trust_remote_code", "the code of a checkpoint is never run; leave it out"),
        ("max_modle_len", "did you mean 'max_model_len'?"),
        ("xyz", "it takes model, dtype, "),
    ],
)
@pytest.mark.parametrize("make", [LLM, nanovllm.AsyncLLM])
def test_a_setting_that_there_is_not_is_told_with_advice(
    make: Any, setting: str, advice: str
) -> None:
    with pytest.raises(TypeError) as caught:
        make("tiny-books", **{setting: 1})
    assert f"{make.__name__}() got an unexpected keyword argument '{setting}'" in str(caught.value)
    assert advice.removeprefix("it takes model, " if make is nanovllm.AsyncLLM else "") in str(
        caught.value
    )


def test_every_exported_name_is_there_and_every_exception_is_exported() -> None:
    for name in nanovllm.__all__:
        assert getattr(nanovllm, name) is not None
    errors = {
        name
        for name, one in vars(nanovllm.errors).items()
        if isinstance(one, type) and issubclass(one, Exception)
    }
    assert errors <= set(nanovllm.__all__)
    assert {"LLM", "AsyncLLM", "Prompt"} <= set(dir(nanovllm))


def test_sampling_params_can_be_copied_with_changes() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.0})
    assert params.clone() == params
    assert params.clone() is not params
    assert params.clone(temperature=0, n=1) == SamplingParams(
        temperature=0, stop=["a"], logit_bias={3: 1.0}
    )
    with pytest.raises(InvalidRequestError, match="top_p is 2"):
        params.clone(top_p=2)
    assert pickle.loads(pickle.dumps(params)) == params


def test_settings_may_be_numpys_numbers() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        seed=np.uint32(7),  # type: ignore[arg-type]
        stop_token_ids=np.array([1, 2]),
        allowed_token_ids=[np.int32(3)],  # type: ignore[list-item]
        logit_bias={np.int64(4): np.float64(1.5)},  # type: ignore[dict-item]
    )
    assert params == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        seed=7,
        stop_token_ids=[1, 2],
        allowed_token_ids=[3],
        logit_bias={4: 1.5},
    )
    assert type(params.max_tokens) is int
