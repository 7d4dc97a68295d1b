"""Checkpoints in every form of the hub: the same weights."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import CheckpointError
from nanovllm.model.checkpoint import open_weights, stored_dtype
from nanovllm.model.families.registry import load_config
from nanovllm.model.weights import ModelWeights
from tests.support.checkpoints import (
    load,
    rewrite,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
)

FORMS: dict[str, dict[str, Any]] = {
    "as transformers saves it": {},
    "as the published gpt2": {"prefix": False, "buffers": True, "aligned": False},
    "with buffers": {"buffers": True},
    "in three shards": {"shards": 3},
    "in shards without prefix": {"shards": 2, "prefix": False, "buffers": True},
    "with the tied head stored": {"stored_head": True},
    "untied": {"tied": False},
    "untied without prefix": {"tied": False, "prefix": False},
}


def by_name(weights: ModelWeights) -> dict[str, np.ndarray]:
    """The loaded tree by the names of the file, written out a second time."""
    named = {
        "wte.weight": weights.token_embedding, "wpe.weight": weights.position_embedding,
        "lm_head.weight": weights.head,
        "ln_f.weight": weights.final_norm.gain, "ln_f.bias": weights.final_norm.bias,
    }  # fmt: skip
    for index, layer in enumerate(weights.layers):
        for name, norm in (("ln_1", layer.attention_norm), ("ln_2", layer.ffn_norm)):
            named |= {f"h.{index}.{name}.weight": norm.gain, f"h.{index}.{name}.bias": norm.bias}
        for name, linear in (
            ("attn.c_attn", layer.qkv),
            ("attn.c_proj", layer.out),
            ("mlp.c_fc", layer.up),
            ("mlp.c_proj", layer.down),
        ):
            named |= {
                f"h.{index}.{name}.weight": linear.weight,
                f"h.{index}.{name}.bias": linear.bias,
            }
    return named


def leaves(tree: object) -> Iterator[np.ndarray]:
    """Every array of a tree of dataclasses and tuples."""
    if isinstance(tree, np.ndarray):
        yield tree
    elif isinstance(tree, tuple):
        yield from itertools.chain.from_iterable(map(leaves, tree))
    elif is_dataclass(tree):
        yield from itertools.chain.from_iterable(
            leaves(getattr(tree, field.name)) for field in fields(tree)
        )


def expected_tensors(*, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    tensors = tiny_tensors(tiny_config(), seed=seed)
    return tensors | ({"lm_head.weight": tensors["wte.weight"]} if tied else {})


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to 8 significant bits, ties to even, by arithmetic instead of bit patterns."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    rounded: np.ndarray = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    return rounded


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(tmp_path: Path, form: str) -> None:
    weights = load(write_checkpoint(tmp_path, **FORMS[form]))
    expected = expected_tensors(tied=FORMS[form].get("tied", True))
    loaded = by_name(weights)
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name, strict=True)
    assert (weights.head is weights.token_embedding) == FORMS[form].get("tied", True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [("F16", lambda array: array.astype(np.float16).astype(np.float32)), ("BF16", to_bfloat16)],
)
def test_smaller_types_are_widened_exactly(
    tmp_path: Path, form: str, dtype: str, rounded: Callable[[np.ndarray], np.ndarray]
) -> None:
    loaded = by_name(load(write_checkpoint(tmp_path, **FORMS[form], dtype=dtype)))
    for name, array in expected_tensors(tied=FORMS[form].get("tied", True)).items():
        np.testing.assert_array_equal(loaded[name], rounded(array), err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("aligned", [True, False])
def test_weights_suit_the_arithmetic(tmp_path: Path, dtype: str, *, aligned: bool) -> None:
    """An array at an odd address would be copied whole by every product."""
    for array in leaves(load(write_checkpoint(tmp_path, dtype=dtype, aligned=aligned))):
        assert array.dtype == np.float32
        assert array.flags.aligned
        assert array.flags.c_contiguous


@pytest.mark.parametrize("change", ["overwritten", "cut short"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_loaded_does_not_depend_on_the_file(
    tmp_path: Path, dtype: str, change: str
) -> None:
    """A mapped file that is cut short would end this process."""
    path = write_checkpoint(tmp_path, dtype=dtype) / "model.safetensors"
    weights = load(tmp_path)
    before = [array.copy() for array in leaves(weights)]
    with path.open("r+b") as file:
        if change == "overwritten":
            file.write(bytes(path.stat().st_size))
        else:
            file.truncate(0)
    for array, expected in zip(leaves(weights), before, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", "float32"), ("F16", "float32"), ("BF16", "bfloat16")]
)
def test_the_type_that_holds_the_stored_numbers(tmp_path: Path, stored: str, dtype: str) -> None:
    assert stored_dtype(write_checkpoint(tmp_path, dtype=stored)) == dtype


def test_blocks_can_be_read_one_at_a_time(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dtype="BF16", shards=2)
    opened = open_weights(folder, load_config(folder))
    whole = by_name(load(folder))
    for name, array in by_name(opened).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert opened.layers[0] is not opened.layers[0]
    with pytest.raises(IndexError):
        opened.layers[len(opened.layers)]


@pytest.mark.parametrize("change", ["overwritten", "cut short", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    opened = open_weights(tmp_path, load_config(tmp_path))
    content = path.read_bytes()
    os.utime(path, ns=(0, 0))  # so that a change within the clock's resolution shows too
    opened_before = open_weights(tmp_path, load_config(tmp_path))
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(path)
    else:
        path.write_bytes(content if change == "overwritten" else content[:-1])
    for weights in (opened, opened_before):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors was changed while it was read"
        ):
            list(weights.layers)


def test_nothing_is_printed_where_nobody_watches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(write_checkpoint(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_a_stored_head_that_is_not_the_tied_one_is_not_dropped(tmp_path: Path) -> None:
    """config.json says tied (the default) but the file has another head: transformers 5 uses it."""
    head = expected_tensors(tied=False)["lm_head.weight"]
    folder = rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    try:
        loaded = load(folder).head
    except CheckpointError as error:
        assert "lm_head.weight" in str(error)  # noqa: PT017
        return
    np.testing.assert_array_equal(loaded, head)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = (
        write_checkpoint(tmp_path_factory.mktemp("flipped"), config={"n_layer": 1})
        / "model.safetensors"
    )
    content = bytearray(path.read_bytes())
    content[int(place * (8 + int.from_bytes(content[:8], "little")))] ^= 1 << bit
    path.write_bytes(content)
    try:
        weights = load(path.parent)
    except CheckpointError:
        return
    assert all(array.dtype == np.float32 for array in leaves(weights))
