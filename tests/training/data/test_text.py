"""Documents from files and folders, the split, and the parts that a text is encoded in."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import TrainingError
from nanovllm.training.data.text import Document, pieces, read_documents, split_documents


def test_folders_are_searched_by_pattern_and_files_read_once(tmp_path: Path) -> None:
    files = {
        "b.py": b"print()\r\nx\r",
        "a/z.py": "\ufeffé = 1\n".encode(),
        "a/__init__.py": b"",
        "notes.txt": b"no",
        "c.py/inside.txt": b"a folder",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    corpus = read_documents([tmp_path, tmp_path / "b.py", tmp_path / "a"], "*.py")
    assert [(document.path.name, document.text) for document in corpus.documents] == [
        ("z.py", "é = 1\n"),
        ("b.py", "print()\nx\n"),
    ]
    assert corpus.warnings == ()


def test_files_of_a_folder_that_are_not_text_are_skipped_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"\0")
    (tmp_path / "c.txt").write_bytes(b"text")
    corpus = read_documents([tmp_path])
    assert [document.path.name for document in corpus.documents] == ["c.txt"]
    (warning,) = corpus.warnings
    assert "skipped 2 of 3 files" in warning
    assert "a.txt is not UTF-8" in warning
    (tmp_path / "c.txt").unlink()
    with pytest.raises(TrainingError, match=r"there is no text\n.*skipped 2 of 2"):
        read_documents([tmp_path])


def test_hidden_folders_and_virtual_environments_in_a_folder_are_skipped(tmp_path: Path) -> None:
    root = tmp_path / ".notes"  # a hidden folder that is named is searched
    for name in (
        "a.py",
        "src/b.py",
        "src/.git/hook.py",
        "src/__pycache__/c.py",
        "src/node_modules/deep/d.py",
        "env/lib/site-packages/e.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("pass")
    (root / "env" / "pyvenv.cfg").touch()
    corpus = read_documents([root], "*.py")
    assert [document.path.name for document in corpus.documents] == ["a.py", "b.py"]
    with pytest.raises(TrainingError, match=r"\(it has 2 \*\.py\)"):
        read_documents([root])


def test_byte_order_marks_at_the_beginning_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "joined.txt"
    path.write_text("\ufeff\ufeffa\ufeffb", encoding="utf-8")
    assert read_documents([path]).texts == ["a\ufeffb"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "there is no text"),
        (b"ab\0c", "binary data: byte 2 is zero"),
        (b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        (b"\xef\xbb\xbfcaf\xe9", "not UTF-8: byte 6 is 0xe9"),
        ("text".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_named_file_that_is_no_text_is_an_error(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(TrainingError, match=message):
        read_documents([path])


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("missing", "*.txt", "does not exist"),
        ("", "*.txt", r"no file that matches '\*\.txt' \(it has 2 \*\.py\)"),
        ("", "/etc/*", "must be a glob pattern"),
    ],
)
def test_paths_and_patterns_without_files_are_errors(
    tmp_path: Path, name: str, pattern: str, message: str
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.py").write_bytes(b"pass")
    with pytest.raises(TrainingError, match=message):
        read_documents([tmp_path / name], pattern)


@pytest.mark.parametrize(
    ("fraction", "train", "validation"),
    [
        (0.1, ["abcd", "ef", "ghi"], ["j"]),
        (0.5, ["abcd", "e"], ["f", "ghij"]),
        (0.4, ["abcd", "ef"], ["ghij"]),
        (0.99, [], ["abcd", "ef", "ghij"]),
    ],
)
def test_the_end_of_the_text_is_held_out(
    fraction: float, train: list[str], validation: list[str]
) -> None:
    documents = [Document(Path(text), text) for text in ("abcd", "ef", "ghij")]
    assert split_documents(documents, fraction) == (train, validation)


@pytest.mark.parametrize(
    ("texts", "fraction", "validation"),
    [
        (["a line of text\n" * 100], 0.1, ["a line of text\n" * 10]),
        (["a line of text\n" * 100], 0.104, ["a line of text\n" * 10]),
        (["a line of text\n" * 100], 0.106, ["a line of text\n" * 11]),
        (["one two three " * 100], 0.1, [" " + "one two three " * 10]),
        (["a\n" + "word " * 400], 0.1, [" " + "word " * 40]),  # the line begins too far away
        (["w" * 1000], 0.1, ["w" * 100]),
        (["x" * 902, "y" * 98], 0.1, ["y" * 98]),
        (["x" * 898, "y" * 102], 0.1, ["y" * 102]),
        (["文字" * 500], 0.1, ["文字" * 50]),
    ],
)
def test_no_line_and_no_word_is_cut(
    texts: list[str], fraction: float, validation: list[str]
) -> None:
    documents = [Document(Path(text), text) for text in texts]
    train, held_out = split_documents(documents, fraction)
    assert held_out == validation
    assert "".join(train + held_out) == "".join(texts)


@given(st.lists(st.text("ab \n\u2028", min_size=1), min_size=1), st.floats(0.01, 0.99))
def test_the_split_is_near_the_fraction(texts: list[str], fraction: float) -> None:
    train, validation = split_documents([Document(Path(one), one) for one in texts], fraction)
    assert "".join(train + validation) == "".join(texts)
    characters = sum(map(len, texts))
    exact = int(characters * (1 - fraction))
    limit = min(exact, characters - exact) / 10
    assert abs(sum(map(len, train)) - exact) <= limit


@given(st.text(alphabet="ab \n\t", max_size=60), st.integers(1, 8))
def test_pieces_are_the_text_and_no_longer_than_allowed(text: str, max_length: int) -> None:
    parts = list(pieces(text, max_length))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= max_length
