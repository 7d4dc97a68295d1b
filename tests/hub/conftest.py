"""A local hub, and a small copy of the published gpt2 repository."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import FakeHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server that speaks the hub's protocol, with nothing in it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "no-such-file")
    with FakeHub() as server:
        yield server


@pytest.fixture
def gpt2_files(tiny_model: Path) -> dict[str, bytes]:
    """The files of a repository like openai-community/gpt2, with a tiny model."""
    others = (
        "pytorch_model.bin",
        "tf_model.h5",
        "rust_model.ot",
        "flax_model.msgpack",
        "onnx/model.onnx",
        "onnx/config.json",
        ".gitattributes",
    )
    return (
        {path.name: path.read_bytes() for path in tiny_model.iterdir()}
        | {"README.md": b"# gpt2\n"}
        | dict.fromkeys(others, b"not for us")
    )
