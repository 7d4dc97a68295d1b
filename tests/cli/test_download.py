"""`nanovllm download` by scripts/download_gpt2.py: output, exit codes, and interruption."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nanovllm.cli.main import build_parser
from nanovllm.hub import read_model_info
from tests.support.fake_hub import FakeHub, Trouble

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "download_gpt2.py"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A server that speaks the hub's protocol, with nothing in it."""
    with FakeHub() as server:
        yield server


@pytest.fixture
def files(tiny_model: Path) -> dict[str, bytes]:
    """Files of a small repository."""
    return {path.name: path.read_bytes() for path in tiny_model.iterdir()}


def start(*flags: str, hub: str, folder: Path) -> "subprocess.Popen[str]":
    variables = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and key != "PYTHONPATH"
    }
    variables |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "cache")}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        stdout=pipe,
        stderr=pipe,
        text=True,
        cwd=folder,
        env=variables,
    )


def finish(*flags: str, hub: str, folder: Path) -> tuple[int, str, str]:
    with start(*flags, hub=hub, folder=folder) as process:
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


def test_the_default_is_gpt2_in_models_and_the_end_says_how_to_serve_it(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("openai-community/gpt2", files)
    code, out, err = finish(hub=hub.url, folder=tmp_path)
    assert (code, err) == (0, "")
    info = read_model_info(tmp_path / "models" / "gpt2")
    assert f"{info['parameters']:,}" in out
    assert "2 layers, 4 heads, d_model 32" in out
    assert f"{sum(map(len, files.values())) / 1e6:,.1f} MB in {len(files)} files" in out
    assert out.endswith(f"nanovllm serve {Path('models/gpt2')}\n")
    assert all(
        (tmp_path / "models" / "gpt2" / name).read_bytes() == content
        for name, content in files.items()
    )


def test_a_bundled_model_needs_no_download(hub: FakeHub, tmp_path: Path) -> None:
    code, _, errors = finish("--model", "tiny-books", hub=hub.url, folder=tmp_path)
    assert code == 0
    assert "tiny-books is part of nanovllm and needs no download" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [("someone/small",), ("--model", "someone/small")])
def test_any_repository_downloads_to_the_output_folder(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    hub.add("someone/small", files)
    code, out, _ = finish(*flags, "--output", "here/it is", hub=hub.url, folder=tmp_path)
    assert code == 0
    assert out.endswith("nanovllm serve 'here/it is'\n")
    assert read_model_info(tmp_path / "here" / "it is")["repo"] == "someone/small"


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_a_stopped_download_goes_on_where_it_stopped(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    large = np.random.default_rng(0).bytes(
        24 << 20
    )  # more than two of the 10 MiB pieces that huggingface-hub writes
    hub.add("openai-community/gpt2", {**files, "model.safetensors": large})
    hub.trouble["model.safetensors"] = Trouble("stall", after_bytes=22 << 20)
    output = tmp_path / "models" / "gpt2"
    with start(hub=hub.url, folder=tmp_path) as process:
        deadline_s = time.monotonic() + 60
        while (
            kept := sum(path.stat().st_size for path in output.rglob("model.safetensors.*"))
        ) < 20 << 20 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not (output / "config.json").exists(), "what is not complete must not look like a model"
    hub.seen.clear()
    assert finish(hub=hub.url, folder=tmp_path)[0] == 0
    assert [seen.range for seen in hub.seen if seen.path.startswith("/store/")] == [
        f"bytes={kept}-"
    ]
    assert kept == 20 << 20
    assert (output / "model.safetensors").read_bytes() == large
    assert not list(output.glob(".*"))


def test_finished_files_are_not_fetched_again(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    files = {
        **files,
        "vocab.json": b"{}",
        "model-1.safetensors": b"1" * 1000,
        "model-2.safetensors": b"2" * 1000,
    }
    del files["model.safetensors"]
    files["model.safetensors.index.json"] = (
        b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    hub.add("openai-community/gpt2", files)
    hub.trouble["model-2.safetensors"] = trouble = Trouble("stall", after_bytes=500)
    with start(hub=hub.url, folder=tmp_path) as process:
        assert trouble.reached.wait(60)
        process.kill()
        process.communicate(timeout=60)
    hub.seen.clear()
    assert finish(hub=hub.url, folder=tmp_path)[0] == 0
    assert "model-1.safetensors" not in hub.fetched()
    assert "model-2.safetensors" in hub.fetched()
    assert all(
        (tmp_path / "models" / "gpt2" / name).read_bytes() == content
        for name, content in files.items()
    )


def test_errors_are_a_line_and_an_exit_code(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    code, _, err = finish(hub="http://127.0.0.1:9", folder=tmp_path)
    assert code == 1
    assert err.startswith("nanovllm download: no connection to http://127.0.0.1:9 ")
    assert err.count("\n") == 1
    hub.add("someone/gated", files, gated=True)
    code, _, err = finish("someone/gated", hub=hub.url, folder=tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert "someone/gated is gated" in err
    assert finish("someone/gated", "--token", "hf_secret", hub=hub.url, folder=tmp_path)[0] == 0
    code, _, err = finish("gpt2", "--model", "gpt2-xl", hub=hub.url, folder=tmp_path)
    assert code == 2
    assert "name one" in err


def test_it_is_a_subcommand() -> None:
    args = build_parser().parse_args(
        ["download", "distilgpt2", "--output", "x", "--revision", "v1"]
    )
    assert (args.model, args.output, args.revision, callable(args.run)) == (
        "distilgpt2",
        Path("x"),
        "v1",
        True,
    )


def test_a_malformed_hub_response_is_a_one_line_error(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("someone/small", {**files, "config.json": b'{"model_type": "\\u001b[31mred"}'})
    code, _, err = finish("someone/small", hub=hub.url, folder=tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert err[:-1].isprintable()
    hub.endless.add("config.json")
    code, _, err = finish("someone/small", hub=hub.url, folder=tmp_path)
    assert (code, err.count("\n")) == (1, 1)
    assert "config.json of someone/small is larger than" in err
