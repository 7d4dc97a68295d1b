"""`nanovllm eval`: the table, the JSON object, precisions and errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.main import main

TEXT = "the cat in the hall, on a wall with a bell\n" * 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["eval", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_all_precisions_are_rows_of_a_table(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path
) -> None:
    arguments = (tiny_model, "--data", file, "--num-threads", 1)
    out, err = run(capsys, *arguments, "--precision", "all")
    title, blank, header, *rows = out.splitlines()
    assert blank == ""
    # with an empty cache, each precision announces its compilation
    assert all(line.startswith("nanovllm: compiling kernels") for line in err.splitlines())
    assert "context 128, stride 128, backend numba, 1 thread" in title
    assert header.split()[:2] == ["precision", "KV"]
    assert [row.split()[:2] for row in rows] == [
        ["float32", "float32"], ["bfloat16", "bfloat16"], ["int8", "bfloat16"],
    ]  # fmt: skip
    assert [row.split()[6] == "-" for row in rows] == [True, False, False]
    out, _ = run(capsys, *arguments, "--precision", "int8,float32", "--json")
    record: dict[str, Any] = json.loads(out)
    int8, float32 = record["results"]
    assert (int8["precision"], float32["precision"]) == ("int8", "float32")
    assert int8["loss_difference"] == pytest.approx(int8["loss"] - float32["loss"])
    assert 0.9 < int8["top1_agreement"] <= 1
    assert float32["loss_difference"] is None
    assert rows[0].split()[2] == f"{float32['loss']:.4f}"
    assert rows[2].split()[4] == f"{int8['bits_per_byte']:.4f}"


def test_dtype_and_quantization_select_one_precision(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path
) -> None:
    arguments = (tiny_model, "--data", file, "--json", "--max-tokens", 20)
    out, _ = run(capsys, *arguments, "--quantization", "int8", "--dtype", "bfloat16")
    (result,) = json.loads(out)["results"]
    assert (result["precision"], result["kv_cache_dtype"]) == ("int8", "bfloat16")
    assert result["loss_difference"] is None
    out, _ = run(
        capsys, *arguments, "--backend", "numpy", "--context", 16, "--stride", 8, "--add-bos-token"
    )
    record = json.loads(out)
    assert (record["tokens"], record["context"], record["stride"]) == (20, 16, 8)
    assert record["add_bos_token"] is True
    assert (record["data"], record["backend"]) == ([str(file)], "numpy")


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"a\0b")
    wrong: list[tuple[list[object], str]] = [
        ([tmp_path / "no-model", "--data", file], "does not exist"),
        ([tiny_model, "--data", tmp_path / "none.txt"], "none.txt does not exist"),
        ([tiny_model, "--data", binary], "byte 1"),
        ([tiny_model, "--data", file, "--context", 999], "the model has 128 positions"),
        ([tiny_model, "--data", file, "--stride", 129], "the context is 128"),
        ([tiny_model, "--data", file, "--precision", "all", "--dtype", "bfloat16"], "leave out"),
        (
            [tiny_model, "--data", file, "--precision", "all", "--backend", "numpy"],
            "computes in float32 only",
        ),
    ]
    for arguments, message in wrong:
        out, err = run(capsys, *arguments, code=1)
        assert out == ""
        assert err.startswith("nanovllm: ")
        assert message in err
        assert err.count("\n") == 1


def test_unknown_precisions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--data", "a.txt", "--precision", "float32,int4"])
    assert caught.value.code == 2
    assert "'int4' must be float32, bfloat16, int8 or all" in capsys.readouterr().err
