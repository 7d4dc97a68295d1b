"""Checkpoints from broken disks: one clear error that lists the faults."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.errors import CheckpointError
from tests.support.checkpoints import (
    load,
    rewrite,
    tiny_config,
    write_checkpoint,
    write_json,
)


def test_all_faults_are_listed_in_one_error(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["h.0.ln_1.bias"], tensors["wpe.weight"]
        tensors["h.7.mlp.c_fc.bias"] = np.zeros(3, dtype=np.float32)
        tensors["score.weight"] = np.zeros((2, 32), dtype=np.float32)
        tensors["h.1.attn.c_attn.weight"] = tensors["h.1.attn.c_attn.weight"].T.copy()
        tensors["ln_f.weight"] = np.zeros((), dtype=np.float32)
        tensors["h.1.ln_2.bias"] = np.zeros(32, dtype=np.int64)

    with pytest.raises(CheckpointError) as caught:
        load(rewrite(tmp_path, spoil))
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "left over: h.7.mlp.c_fc.bias",
        "left over: score.weight",
        "missing: h.0.ln_1.bias [32]",
        "missing: wpe.weight [128, 32]",
        "wrong shape: h.1.attn.c_attn.weight is [96, 32], config.json asks for [32, 96]",
        "wrong shape: ln_f.weight is [], config.json asks for [32]",
        "wrong type: h.1.ln_2.bias is I64, not one of F32, F16, BF16",
    ]


@pytest.mark.parametrize(
    ("n_layer", "says"),
    [(3, "missing: h.2.attn.c_attn.weight"), (1, "left over: h.1.attn.c_attn.weight")],
)
def test_another_number_of_layers(tmp_path: Path, n_layer: int, says: str) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", tiny_config(n_layer=n_layer))
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


def test_a_very_long_list_is_cut(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", tiny_config(n_layer=200))
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 10_000


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load(write_checkpoint(tmp_path, tied=False, stored_head=False))


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wte\.weight is there twice"):
        load(
            rewrite(
                tmp_path,
                lambda tensors: tensors.update({"transformer.wte.weight": tensors["wte.weight"]}),
            )
        )


def test_a_tensor_that_is_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError,
        match=(
            r"twice, in model-00001-of-00002\.safetensors "
            r"and in model-00002-of-00002\.safetensors"
        ),
    ):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 2000, -1000, -4, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_named(tmp_path: Path, size: int, shards: int) -> None:
    write_checkpoint(tmp_path, shards=shards)
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=path.name):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        b"PK\x03\x04" + bytes(500),
    ],
)
def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)


def test_names_from_a_file_are_short_and_printable(tmp_path: Path) -> None:
    names = ("\x1b[31m", "transformer.\x1b[31m", "\u202e" * 10_000, "x" * 10_000)

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: np.zeros(3, dtype=np.float32) for name in names[2:]})

    with pytest.raises(CheckpointError) as left_over:
        load(rewrite(tmp_path / "one", spoil))
    with pytest.raises(CheckpointError) as twice:
        load(
            rewrite(
                tmp_path / "two",
                lambda tensors: tensors.update(
                    {name: np.zeros(3, dtype=np.float32) for name in names[:2]}
                ),
            )
        )
    folder = write_checkpoint(tmp_path / "three", shards=2)
    index = {"weight_map": {"wte.weight": "\x1b" * 10_000}}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError) as missing:
        load(folder)
    for caught, says in ((left_over, "left over"), (twice, "is there twice"), (missing, "lacks 1")):
        message = str(caught.value).replace(str(tmp_path), "")
        assert says in message
        assert message.replace("\n", "").isprintable()
        assert len(message) < 1000


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n",
        encoding="utf-8",
    )
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, .*git lfs pull"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "weight_map"),
        ([], "must hold an object"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["model-00001-of-00002.safetensors"]}, "weight_map"),
        ({"weight_map": {"wte.weight": 1}}, "weight_map"),
        (
            {"weight_map": {"wte.weight": "model-00009-of-00009.safetensors"}},
            r"lacks 1 of the 1 files.*model-00009-of-00009\.safetensors",
        ),
        ({"weight_map": {"wte.weight": ""}}, "lacks"),
        ({"weight_map": {"wte.weight": ".."}}, "lacks"),
        ({"weight_map": {"wte.weight": "config.json"}}, r"config\.json is damaged"),
    ],
)
def test_a_bad_index(tmp_path: Path, index: object, says: str) -> None:
    write_json(write_checkpoint(tmp_path, shards=2) / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/model.safetensors",
        "sub/../../elsewhere/model.safetensors",
        "..\\elsewhere\\model.safetensors",
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "elsewhere")
    folder = write_checkpoint(tmp_path / "model", shards=2)
    for path in (name, str(tmp_path / "elsewhere" / "model.safetensors")):
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"wte.weight": path}})
        with pytest.raises(CheckpointError, match="outside its own folder"):
            load(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        load(tmp_path)


def test_a_folder_with_a_pickle_only(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*converted to safetensors"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load(tmp_path)
