"""`nanovllm ablate`: the table, the map, its files and errors."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm.evaluation import ablate
from tests.support.html_page import HtmlPage

TEXT = "the cat in the hall, on a wall with a bell\n" * 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["ablate", *map(str, arguments), "--backend", "numpy"]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_table_begins_with_the_most_important_part(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path
) -> None:
    out, _ = run(capsys, tiny_model, "--data", file)
    title, whole, _, *_, table = out.split("\n", 3)
    assert "bytes in 1 text, context 128" in title
    result = ablate(tiny_model, TEXT, backend="numpy")
    loss = f"{result.loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte"
    assert whole == f"whole model: {loss}"
    heat_map, rows = table.split("without    ")
    assert "layer \\ head  0   1   2   3   attention  feed-forward  block" in heat_map
    best = max(each.change for each in result.parts)
    assert heat_map.count("##") >= 3  # of the explanation, of the heads, of the others
    changes = [float(row.split()[-3]) for row in rows.splitlines()[1:]]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 14
    assert changes[0] == pytest.approx(best, abs=1e-4)


def test_the_table_can_be_in_the_order_of_layers(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path
) -> None:
    out, _ = run(
        capsys, tiny_model, "--data", file, "--sort", "layer", "--parts", "block,ffn",
        "--max-tokens", 9, "--context", 8,
    )  # fmt: skip
    assert "9 tokens of" in out
    assert "context 8" in out
    rows = out.splitlines()[-4:]
    assert [row.rsplit(maxsplit=4)[0] for row in rows] == [
        "layer 0 feed-forward", "layer 0 block", "layer 1 feed-forward", "layer 1 block",
    ]  # fmt: skip


def test_the_figures_and_the_page_are_files(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    result = ablate(tiny_model, TEXT, backend="numpy")
    out, _ = run(capsys, tiny_model, "--data", file, "--output", tmp_path / "a.json")
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'a.json'} (0.00 MB)"
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (record["command"], record["loss"]) == ("ablate", result.loss)
    assert record["parts"][2] == {
        "layer": 0, "kind": "head", "head": 2, "loss": result.parts[2].loss,
        "change": result.parts[2].change, "standard_error": result.parts[2].standard_error,
        "bits_per_byte": result.parts[2].bits_per_byte,
    }  # fmt: skip
    run(capsys, tiny_model, "--data", file, "--output", tmp_path / "a.html")
    data = HtmlPage((tmp_path / "a.html").read_text(encoding="utf-8")).data
    assert (data["kind"], data["layers"], data["heads"]) == ("ablation", 2, 4)
    assert [part["loss"] for part in data["parts"]] == [each.loss for each in result.parts]


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs the extra visualize")
def test_a_picture_has_two_maps_with_labelled_axes(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "map.svg"
    run(capsys, tiny_model, "--data", file, "--output", path)
    svg = path.read_text(encoding="utf-8")
    labels = ("head", "layer", "sublayer or block", "feed-forward", "nats per token")
    assert all(f">{label}<" in svg or label in svg for label in labels)
    run(capsys, tiny_model, "--data", file, "--parts", "head", "--output", path)
    assert "feed-forward" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "missing/a.html"], "cannot be written: the folder missing does not exist"),
        (["--context", "999"], "context is 999, but the model has 128 positions"),
        (["--data", "nothing.txt"], "nothing.txt"),
    ],
)
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    file: Path,
    arguments: list[str],
    message: str,
) -> None:
    out, err = run(capsys, tiny_model, "--data", file, *arguments, code=1)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "a", "--parts", "head,neck"], "'neck' must be head, attention, ffn, block"),
        (["--data", "a", "--output", "a.jpg"], "must end with .html, .svg, .png or .json"),
        (["--data", "a", "--max-tokens", "0"], "0 must be an integer, at least 1"),
        ([], "--data"),
    ],
)
def test_an_invalid_option_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["ablate", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
