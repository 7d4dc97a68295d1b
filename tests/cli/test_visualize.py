"""`nanovllm visualize` and `nanovllm trace`: files, text, JSON and errors."""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm.inspection import pictures

PROMPT = "the cat <script> $x_1$ \n in the \xe9\x1f hall"
KINDS = {
    "attention": ["--prompt", PROMPT],
    "logit-lens": ["--prompt", PROMPT],
    "embeddings": ["--limit", "30", "--prompt", "the"],
}
needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="needs the extra visualize"
)


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_one_file(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "page.html"
    path.write_text("an older file", encoding="utf-8")
    out, _ = run(capsys, "visualize", kind, tiny_model, *KINDS[kind], "--output", path)
    assert out.startswith(f"wrote {path} (0.")
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert f'"kind":"{kind}"' in page
    assert list(tmp_path.iterdir()) == [path]


@needs_matplotlib
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_a_title_and_labelled_axes(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    for name in ("picture.png", "picture.svg"):
        run(capsys, "visualize", kind, tiny_model, *KINDS[kind], "--output", tmp_path / name)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    labels = {
        "attention": ["position of the key", "layer 1", "head 3", "attention weight"],
        "logit-lens": ["logit lens", "after layer 1 (output)", "probability"],
        "embeddings": ["component 1", "% of the variance", "PCA"],
    }
    assert all(label in svg for label in labels[kind])
    assert "<script" not in svg


@needs_matplotlib
def test_a_picture_of_one_head_is_labelled_with_its_tokens(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "head.svg"
    chosen = ("--layers", 1, "--heads", 2)
    run(
        capsys, "visualize", "attention", tiny_model, *KINDS["attention"], *chosen, "--output", path
    )
    svg = path.read_text(encoding="utf-8")
    assert "attention of layer 1, head 2" in svg
    assert all(
        text in svg for text in ("␣the", "↵", "&lt;", r"\xC3", r"\x1F", "key: token that is read")
    )


def test_a_page_has_the_chosen_heads_only(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    arguments = ("--prompt", "the cat", "--layers", "1", "--heads", "0,2-3", "--output", path)
    run(capsys, "visualize", "attention", tiny_model, *arguments)
    match = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"))
    assert match is not None
    heads = json.loads(match[1])["overview"]["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [(1, 0), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "4"], "--heads has 4, but the model has the heads 0 to 3"),
        (["--prompt", "a" * 200], "the prompt has 200 tokens, the limit is 128; shorten it"),
    ],
)
def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    output = ("--prompt", "the", "--output", tmp_path / "page.html")
    out, err = run(capsys, "visualize", "attention", tiny_model, *output, *arguments, code=1)
    assert (out, err) == ("", f"nanovllm: {message}\n")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "missing"
    output = ("--prompt", "a", "--output", folder / "a.html")
    _, err = run(capsys, "visualize", "attention", tmp_path / "no model", *output, code=1)
    message = f"{folder / 'a.html'} cannot be written: the folder {folder} does not exist"
    assert err == f"nanovllm: {message}\n"


@needs_matplotlib
def test_a_picture_of_the_lens_has_room_for_so_many_tokens(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ("--prompt", "a" * 41, "--output", tmp_path / "lens.png")
    _, err = run(capsys, "visualize", "logit-lens", tiny_model, *arguments, code=1)
    assert "has 41 tokens, a picture shows up to 40; shorten it, or write an .html file" in err


def test_a_picture_without_matplotlib_names_the_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    arguments = ("--prompt", "a", "--output", tmp_path / "lens.png")
    _, err = run(capsys, "visualize", "logit-lens", *arguments, code=1)
    assert "pip install matplotlib scikit-learn, or write an .html file" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--output", "picture.jpg"],
        ["--output", "page.html", "--layers", "1-"],
        ["--output", "page.html", "--heads", "3-2"],
    ],
)
def test_an_invalid_option_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["visualize", "attention", "--prompt", "a", *arguments])
    assert raised.value.code == 2
    assert "must" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("sklearn") is None, reason="needs the extra visualize")
def test_tsne_is_drawn_beside_pca(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    arguments = ("--method", "tsne", "--limit", 40, "--output", path)
    run(capsys, "visualize", "embeddings", tiny_model, *arguments)
    page = path.read_text(encoding="utf-8")
    assert '"pca":{"method":"pca"' in page
    assert '"tsne":{"method":"tsne"' in page


def test_tsne_without_scikit_learn_names_the_extra(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    arguments = ("--method", "tsne", "--output", tmp_path / "page.html")
    _, err = run(capsys, "visualize", "embeddings", tiny_model, *arguments, code=1)
    assert "t-SNE needs scikit-learn; pip install scikit-learn, or use pca" in err


def test_a_trace_has_a_line_for_each_operation(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    out, _ = run(capsys, "trace", "--model", tiny_model, "the cat \x1b[31m")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in out
    assert lines[0].endswith("2 layers, 4 heads, d_model 32, vocabulary 267")
    for part in ("queries Q", "keys K", "values V", "scores: scale Q K^T", "softmax(scores)"):
        assert sum(part in line for line in lines) == 2
    assert sum(line.strip().startswith("lens") for line in lines) == 3
    (output,) = (line for line in lines if line.startswith("output head"))
    assert "[1, 267]" in output


def test_a_trace_is_also_a_json_object(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    out, _ = run(capsys, "trace", "--model", tiny_model, "the cat", "--json", "--top", 2)
    record = json.loads(out)
    assert "".join(token["text"] for token in record["tokens"]) == "the cat"
    steps = record["steps"]
    assert len(steps) == 1 + 2 * 11 + 2
    size = len(record["tokens"])
    weights = next(step for step in steps if step["name"] == "attention_weights")
    assert weights["shape"] == [4, size, size]
    assert weights["mean"] == pytest.approx(1 / size)
    assert len(weights["heads"]) == 4
    scores = next(step for step in steps if step["name"] == "attention_scores")
    assert scores["shape"] == [4, size, size]
    assert -100 < scores["min"] < scores["max"] < 100  # without the keys after a query
    queries = next(step for step in steps if step["name"] == "queries")
    assert queries["shape"] == [size, 4, 8]
    assert steps[-1]["prediction"] == steps[-3]["prediction"]
    assert len(steps[-1]["prediction"]["top"]) == 2
    _, err = run(capsys, "trace", "--model", tiny_model, "the", "--top", 21, code=1)
    assert "top is 21 but must be 1 to 20" in err
