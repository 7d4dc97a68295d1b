"""Each notebook is current, and its cells run, with their assertions."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.requirements import missing
from tools.notebooks.__main__ import NOTEBOOKS, notebook_of, sources

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_the_notebook_is_current(source: Path) -> None:
    text = (NOTEBOOKS / f"{source.stem}.ipynb").read_text(encoding="utf-8")
    assert text == notebook_of(source), "run python -m tools.notebooks"
    book = json.loads(text)
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 4
    assert all(cell["source"] for cell in book["cells"])


@pytest.mark.slow(6)
@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_its_cells_run(source: Path, tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        missing("matplotlib is not installed")
    book = json.loads((NOTEBOOKS / f"{source.stem}.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n\n".join(cells)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
