"""Each notebook is current and has its outputs, and its cells run, with their assertions."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.requirements import missing
from tools.notebooks.__main__ import NOTEBOOKS, install_cell, notebook_of, sources

ROOT = Path(__file__).parents[2]
MAX_BYTES = 600_000  # of all notebooks; they are part of each clone
each_source = pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)


def stored(source: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(
        (NOTEBOOKS / f"{source.stem}.ipynb").read_text(encoding="utf-8")
    )
    return notebook


@each_source
def test_the_notebook_is_current(source: Path) -> None:
    notebook = stored(source)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
    assert notebook == notebook_of(source), "run make notebooks"
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[:2] == ["markdown", "code"]
    assert kinds.count("code") >= 4
    assert all(cell["source"] for cell in notebook["cells"])


@each_source
def test_the_notebook_has_its_outputs(source: Path) -> None:
    cells = [cell for cell in stored(source)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "picture") for output in outputs} == {"stdout", "picture"}
    pictures = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    assert pictures
    assert all("image/png" in data for data in pictures)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r" at 0x|/tmp/|/home/", text), "it differs at each run"


def test_the_notebooks_are_small() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS.glob("*.ipynb")) < MAX_BYTES


@pytest.mark.slow(6)
@each_source
def test_its_cells_run(source: Path, tmp_path: Path) -> None:
    if find_spec("matplotlib") is None:
        missing("matplotlib is not installed")
    cells = [
        "".join(cell["source"])
        for cell in notebook_of(source)["cells"]
        if cell["cell_type"] == "code"
    ]
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


def test_the_first_cell_installs_a_wheel_where_nanovllm_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    cell = compile(install_cell(), "_install.py", "exec")
    exec(cell, {})
    assert not commands, "it is installed here"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            ModuleNotFoundError, match=r"`make wheel` in .* upload the wheel from dist/"
        ):
            exec(cell, {})
        (tmp_path / "nanovllm-0.1.0-py3-none-any.whl").touch()
        exec(cell, {})
    [[*pip, wheel, also]] = commands
    assert pip == [sys.executable, "-m", "pip", "install", "--quiet"]
    assert Path(wheel) == tmp_path / "nanovllm-0.1.0-py3-none-any.whl"
    assert also == "matplotlib"
