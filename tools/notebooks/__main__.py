"""Write the notebooks: python -m tools.notebooks."""

import json
import re
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
NOTEBOOKS = SOURCES.parents[1] / "nanovllm" / "learn" / "notebooks"
_CELL = re.compile(r"(?m)^# %%(.*)\n")
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """Return the modules that are notebooks."""
    return sorted(path for path in SOURCES.glob("*.py") if not path.name.startswith("_"))


def notebook_of(source: Path) -> str:
    """Return a module as a notebook without outputs: its docstring, then its cells."""
    parts = _CELL.split(source.read_text(encoding="utf-8"))
    cells = [_cell(0, "markdown", parts[0].strip().strip('"').strip())]
    for number, (kind, text) in enumerate(zip(parts[1::2], parts[2::2], strict=True), 1):
        is_text = kind.strip() == "[markdown]"
        content = re.sub(r"(?m)^# ?", "", text) if is_text else text
        cells.append(_cell(number, "markdown" if is_text else "code", content.strip()))
    book = {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return {**cell, "source": text.splitlines(keepends=True)}


def main() -> int:
    """Write all notebooks."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for source in sources():
        path = NOTEBOOKS / f"{source.stem}.ipynb"
        path.write_text(notebook_of(source), encoding="utf-8")
        print(f"wrote {path.relative_to(NOTEBOOKS.parents[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
