"""EngineConfig: ranges, sizes as text, and unknown settings."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.config import EngineConfig, parse_bytes

POSITIVE = ("block_size", "max_num_seqs", "max_num_batched_tokens")
OPTIONAL = ("max_model_len", "num_blocks", "num_threads")
FLAGS = ("enable_prefix_caching", "batch_invariant")
OTHERS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "backend",
    "kv_cache_memory",
    "seed",
    "max_logprobs",
    "scheduling_policy",
    "speculative_config",
)


def make(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"max_num_seqs": 1, **settings})


def test_every_setting_is_covered_here() -> None:
    assert {field.name for field in fields(EngineConfig)} == {*POSITIVE, *OPTIONAL, *FLAGS, *OTHERS}


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = EngineConfig()
    assert (
        config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.kv_cache_bytes,
    ) == (32, 32, 512, 2**30)
    assert (config.dtype, config.backend, config.enable_prefix_caching, config.max_model_len) == (
        "float32",
        "numba",
        True,
        None,
    )


@pytest.mark.parametrize("name", [*POSITIVE, *OPTIONAL])
def test_counts_are_at_least_one(name: str) -> None:
    assert getattr(make(**{name: 1}), name) == 1
    for value in (0, -1, 1.0, "1", True):
        with pytest.raises(ValueError, match=rf"{name} is .* integer, at least 1"):
            make(**{name: value})
    if name in OPTIONAL:
        assert getattr(make(**{name: None}), name) is None
    else:
        with pytest.raises(ValueError, match=name):
            make(**{name: None})


def test_every_running_sequence_needs_a_token_a_step() -> None:
    EngineConfig(max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(
        ValueError,
        match=r"max_num_batched_tokens is 7, less than max_num_seqs \(8\).*raise the first",
    ):
        EngineConfig(max_num_seqs=8, max_num_batched_tokens=7)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_flags(name: str) -> None:
    assert getattr(make(**{name: True}), name) is True
    for value in (1, "no", None):
        with pytest.raises(ValueError, match=f"{name} is .* true or false"):
            make(**{name: value})


WRONG_CHOICES = [
    ("backend", "cuda"), ("backend", None), ("dtype", "float16"), ("dtype", 32),
    ("quantization", "int4"), ("quantization", "none"), ("kv_cache_dtype", "float16"),
    ("kv_cache_dtype", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_CHOICES)
def test_choices_are_listed(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r} but must be '[a-z0-9]+'"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "bfloat16"), ("quantization", "int8"), ("kv_cache_dtype", "bfloat16")],
)
def test_numpy_computes_in_float32_only(name: str, value: str) -> None:
    assert getattr(make(**{name: value}), name) == value
    with pytest.raises(
        ValueError,
        match=f"{name} is '{value}', but backend='numpy' computes in float32 only; .*'numba'",
    ):
        make(**{name: value}, backend="numpy")


def test_seed_and_max_logprobs() -> None:
    for seed in (None, 0, -5, 2**70):
        assert make(seed=seed).seed == seed
    assert make(max_logprobs=0).max_logprobs == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", value) for value in (1.5, "1", True, [1])),
        *(("max_logprobs", value) for value in (-1, 1.5, "5", None, True)),
    ],
)
def test_what_is_no_seed_and_no_number_of_log_probabilities(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* integer"):
        make(**{name: value})


def test_the_scheduling_policy_is_one_of_three() -> None:
    assert make().scheduling_policy == "fcfs"
    assert make(scheduling_policy="priority").scheduling_policy == "priority"
    with pytest.raises(
        ValueError, match=r"scheduling_policy is 'lifo' .* 'fcfs' or 'priority' or 'fair'"
    ):
        make(scheduling_policy="lifo")


def test_unknown_settings_are_refused_and_settings_do_not_change() -> None:
    with pytest.raises(TypeError, match="blok_size"):
        EngineConfig(blok_size=32)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        EngineConfig("float32")  # type: ignore[call-arg]
    with pytest.raises(FrozenInstanceError):
        EngineConfig().block_size = 16  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1), (12345, 12345), ("1", 1), ("12345", 12345), ("1b", 1), ("1 B", 1),
        (" 2 GiB ", 2 * 2**30), ("512MiB", 512 * 2**20), ("1.5GB", 1_500_000_000),
        ("1.5GiB", 3 * 2**29), ("4G", 4 * 2**30), ("4g", 4 * 2**30), ("3k", 3072), ("3kb", 3000),
        ("3KiB", 3072), ("2TB", 2 * 10**12), ("100TiB", 100 * 2**40), ("7M", 7 * 2**20),
        ("0.5KiB", 512), ("999999999999999", 999_999_999_999_999), (10**20, 10**20),
    ],
)  # fmt: skip
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_bytes(size) == expected
    assert make(kv_cache_memory=size).kv_cache_bytes == expected


@pytest.mark.parametrize(
    "size",
    [
        0,
        -1,
        True,
        1.5,
        None,
        "",
        "GiB",
        "1PB",
        "-1GB",
        "1e9",
        "1,5GB",
        "1 000",
        "0",
        "0.0GB",
        "0.4",
        "0.9b",
        "inf",
        "nan",
        "1" * 16,
        b"1",
    ],
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(
        ValueError,
        match="not a size of at least one byte; use a number of bytes, or text such as",
    ):
        parse_bytes(size)
    with pytest.raises(ValueError, match="not a size"):
        make(kv_cache_memory=size)


@given(st.text(max_size=12))
def test_any_text_is_a_positive_size_or_refused(text: str) -> None:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        message = str(error)
    else:
        assert size >= 1
        return
    assert "not a size" in message
