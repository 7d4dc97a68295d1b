"""Prepare books with wrapped lines as training text: one file a book, one line a paragraph.

Run: python scripts/bundled_model/prepare_books.py BOOKS OUTPUT --held-out carroll-alice

- The first paragraph, which is the title, and headings are dropped.
- Wrapped lines are joined; lines of verse, which are indented, stay lines.
- A hyphen at a line's end is dropped if the book has the word without it.
- Underscores around emphasized words are dropped, curly quotes become straight, and runs of spaces
  become one space.

The held-out books are the last files by name, so that they are the validation split of
`nanovllm train`. The last line of output is the --validation-fraction that splits the text there.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_LONGEST_HEADING = 60
_NUMBERED = re.compile(r"(chapter|letter|stave|adventure) \S+|[ivxl\d]+(\.|:|--)", re.IGNORECASE)
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "_": None})


def clean(text: str) -> str:
    """Return the prose of a book: paragraphs of one line, with an empty line between two."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    paragraphs = re.split(r"\n\s*\n", text.translate(_PLAIN).strip())[1:]
    kept = [_unwrap(paragraph.split("\n"), words) for paragraph in paragraphs]
    return "\n\n".join(paragraph for paragraph in kept if not _is_heading(paragraph)) + "\n"


def _unwrap(lines: list[str], words: set[str]) -> str:
    """Return a paragraph without line ends, or verse with them."""
    stripped = [" ".join(line.split()) for line in lines if line.strip()]
    if len(lines) > 1 and all(line.startswith("  ") for line in lines):
        return "\n".join(stripped)
    joined = ""
    for line in stripped:
        if not joined or joined.endswith("--"):
            joined += line
        elif joined.endswith("-"):
            first = re.findall(r"[a-z]*$", joined[:-1].lower())[0]
            second = re.findall(r"^[a-z]*", line.lower())[0]
            joined = (joined[:-1] if first + second in words else joined) + line
        else:
            joined += " " + line
    return joined


def _is_heading(paragraph: str) -> bool:
    """Return whether a paragraph is a heading, a signature or a line of asterisks."""
    if not re.search(r"[a-z]", paragraph):
        return True
    if "\n" in paragraph or len(paragraph) > _LONGEST_HEADING:
        return False
    if paragraph.startswith("["):
        return True
    return bool(_NUMBERED.match(paragraph)) or paragraph[-1] not in ".!?\"':;,-)"


def write_books(
    books: Path, output: Path, *, held_out: Sequence[str], leave_out: Sequence[str] = ()
) -> tuple[int, int]:
    """Write the books to a new folder; return the characters held out, and of all books."""
    texts = {
        file.stem: clean(file.read_text(encoding="utf-8"))
        for file in sorted(books.glob("*.txt"))
        if file.stem not in leave_out
    }
    output.mkdir(parents=True)
    for name, text in texts.items():
        split = "validation" if name in held_out else "train"
        (output / f"{split}-{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    return sum(len(texts[name]) for name in held_out), sum(map(len, texts.values()))


def main() -> int:
    """Write the books, and print the fraction of the held-out ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", type=Path, help="folder of .txt files")
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="NAME", help="books that are not used"
    )
    parser.add_argument(
        "--held-out", nargs="+", required=True, metavar="NAME", help="books for validation"
    )
    parsed = parser.parse_args()
    for name in (*parsed.held_out, *parsed.leave_out):
        if not (parsed.books / f"{name}.txt").is_file():
            parser.error(f"{parsed.books} has no {name}.txt")
    held_out, total = write_books(
        parsed.books, parsed.output, held_out=parsed.held_out, leave_out=parsed.leave_out
    )
    print(f"{total:,} characters, {held_out:,} of them held out")
    # Half a character less: the product with `total`, rounded down, is the number for training.
    print(f"validation_fraction = {(held_out - 0.5) / total:.12f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
