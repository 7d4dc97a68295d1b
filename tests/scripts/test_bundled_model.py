"""scripts/bundled_model: the text of books, the settings of both models, and weights in float16."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanovllm import TrainingConfig
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.training.config import read_toml
from scripts.bundled_model.convert import convert, on_grid
from scripts.bundled_model.prepare_books import clean, write_books
from scripts.bundled_model.write_target_text import prompts_of, write

SETTINGS = Path(__file__).parents[2] / "scripts" / "bundled_model"
BOOK = """The Sea, by Nobody 1900

CHAPTER I. THE CAPTAIN

The old cap-
tain had a _well-
known_ ship.  "It is--
mine," said he. \u201cNo!\u201d

   The captain

     Over the sea,
     Under the tree.

I. An Island

I.

[Illustration]

THE END
"""


def test_the_prose_of_a_book_has_a_line_for_each_paragraph() -> None:
    assert clean(BOOK) == (
        'The old captain had a well-known ship. "It is--mine," said he. "No!"\n\n'
        "Over the sea,\nUnder the tree.\n"
    )


def test_the_held_out_books_are_the_last(tmp_path: Path) -> None:
    books, output = tmp_path / "books", tmp_path / "output"
    books.mkdir()
    for name, sentences in (("a", 5), ("b", 15), ("c", 30)):
        text = "Title\n\n" + "It was a dark night. " * sentences
        (books / f"{name}.txt").write_text(text, encoding="utf-8")
    held_out, total = write_books(books, output, held_out=["a"], leave_out=["c"])
    assert [file.name for file in sorted(output.iterdir())] == ["train-b.txt", "validation-a.txt"]
    texts = [file.read_text(encoding="utf-8") for file in sorted(output.iterdir())]
    assert (held_out, total) == (len(texts[1]), len(texts[0]) + len(texts[1]))


@pytest.mark.parametrize(
    ("name", "vocab", "largest"), [("tiny-books", 2048, 14e6), ("tiny-books-draft", 2048, 2e6)]
)
def test_the_settings_give_a_model_that_is_small_enough(
    name: str, vocab: int, largest: float
) -> None:
    settings = read_toml(SETTINGS / f"{name}.toml")
    config = TrainingConfig.from_dict({**settings, "data": "books", "output": "run"}, name)
    assert None not in {config.layers, config.heads, config.width, config.context}
    model = ModelConfig(
        vocab=vocab,
        max_positions=config.context or 0,
        d_model=config.width or 0,
        layers=config.layers or 0,
        heads=config.heads or 0,
        d_ff=4 * (config.width or 0),
    )
    tokenizer_bytes = 130_000
    assert 2 * model.num_parameters + tokenizer_bytes < largest


def test_rows_are_rounded_to_multiples_of_a_power_of_two() -> None:
    rows = np.random.default_rng(0).normal(0, 0.05, (40, 300)).astype(np.float32)
    rows[0], rows[1, 7] = 0.0, 8.0
    rounded = on_grid(rows, 7)
    np.testing.assert_array_equal(rounded, rounded.astype(np.float16))
    np.testing.assert_array_equal(rounded[0], 0.0)
    for row, kept in zip(rows[1:], rounded[1:], strict=True):
        step = next(2.0**e for e in range(9, -30, -1) if np.all(kept % 2.0**e == 0))
        assert np.abs(kept).max() <= 63 * step
        assert step <= 2 * np.abs(row).max() / 63
        inside = np.abs(row) <= 63 * step
        assert np.abs(kept - row)[inside].max() <= step / 2
    np.testing.assert_allclose(on_grid(rows, 11), rows, atol=8.0 / 1023)


def test_weights_are_converted_to_float16(tiny_model: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    run.mkdir()
    for file in tiny_model.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    for name in ("generation_config.json", "tokenizer_config.json"):
        (run / name).write_text("{}", encoding="utf-8")
    weights = load_file(run / "model.safetensors")
    size = convert(run, output, 7)
    assert size == sum(file.stat().st_size for file in output.iterdir())
    assert load_config(output) == load_config(run)
    for name, tensor in load_file(output / "model.safetensors").items():
        bits = 6 if ".mlp." in name else 7
        expected = on_grid(weights[name], bits) if tensor.ndim == 2 else weights[name]
        np.testing.assert_array_equal(tensor, expected.astype(np.float16))
    name = next(iter(weights))
    weights[name] = np.full_like(weights[name], 1e6)
    save_file(weights, run / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is not finite in float16"):
        convert(run, output, 7)


def test_a_model_writes_text_for_its_draft_model(tiny_model: Path, tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    paragraphs = [f"{i} the cat in the hall and the cat in the hat of the hall" for i in range(3)]
    (books / "train-a.txt").write_text("\n\n".join([*paragraphs, "Short."]), encoding="utf-8")
    prompts = prompts_of(sorted(books.iterdir()), 4, seed=0)
    starts = {" ".join(paragraph.split()[:12]) for paragraph in paragraphs}
    assert (set(prompts), prompts[3]) == (starts, prompts[0])
    output = tmp_path / "output"
    tokens = write(str(tiny_model), sorted(books.iterdir()), output, 2)
    texts = {file.name: file.read_text(encoding="utf-8") for file in output.iterdir()}
    assert sorted(texts) == [f"temperature-{each}.txt" for each in ("0.0", "0.8", "1.0")]
    assert all(text.startswith(tuple(starts)) for text in texts.values())
    assert tokens > 0
    with pytest.raises(FileExistsError):
        write(str(tiny_model), sorted(books.iterdir()), output, 2)
