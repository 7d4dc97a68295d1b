"""Run the notebooks and write them with their outputs: python -m tools.notebooks [NAME ...].

It needs the extra `notebooks`. Outputs are what the cells print and draw; progress bars are left
out, and any other text on standard error, as of a warning, is an error.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
ROOT = SOURCES.parents[1]
NOTEBOOKS = ROOT / "nanovllm" / "learn" / "notebooks"
_CELL = re.compile(r"(?m)^# %%(.*)\n")
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """Return the modules that are notebooks."""
    return sorted(path for path in SOURCES.glob("*.py") if not path.name.startswith("_"))


def install_cell() -> str:
    """Return the first cell of code of each notebook."""
    return (SOURCES / "_install.py").read_text(encoding="utf-8")


def notebook_of(source: Path) -> dict[str, Any]:
    """Return a module as a notebook without outputs: docstring, `install_cell`, its cells."""
    parts = _CELL.split(source.read_text(encoding="utf-8"))
    cells = [
        _cell(0, "markdown", parts[0].strip().strip('"').strip()),
        _cell(1, "code", install_cell().strip()),
    ]
    for number, (kind, text) in enumerate(zip(parts[1::2], parts[2::2], strict=True), 2):
        is_text = kind.strip() == "[markdown]"
        content = re.sub(r"(?m)^# ?", "", text) if is_text else text
        cells.append(_cell(number, "markdown" if is_text else "code", content.strip()))
    return {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return {**cell, "source": text.splitlines(keepends=True)}


def run(notebook: dict[str, Any]) -> str:
    """Run a notebook in a temporary folder; return it with its outputs, as the text of a file."""
    try:
        import nbformat  # noqa: PLC0415 - of the extra `notebooks`
        from nbclient import NotebookClient  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit('Jupyter is missing: pip install -e ".[notebooks]"') from error
    book = nbformat.reads(json.dumps(notebook), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            book,
            timeout=300,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        client.execute(
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                "IPYTHONDIR": str(Path(folder) / "ipython"),  # no settings of this user
                "HF_HUB_OFFLINE": "1",
            }
        )
    book["metadata"] = _METADATA
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _outputs(cell)
    return f"{nbformat.writes(book)}\n"


def _small(png: str) -> str:
    """Return a picture with 256 colors, which is half of its size: it is no photograph."""
    from PIL import Image  # noqa: PLC0415 - matplotlib needs it

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _outputs(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a cell's outputs without progress bars; what it prints is one output."""
    outputs: list[dict[str, Any]] = []
    for output in cell["outputs"]:
        text, data = output.get("text", ""), output.get("data", {})
        if "image/png" in data:
            data["image/png"] = _small(data["image/png"])
        if output.get("name") == "stderr":
            if "\r" not in text and text.strip():
                raise SystemExit(f"a cell warns: {text}\nThe cell is\n{cell['source']}")
        elif text and outputs and "text" in outputs[-1]:
            outputs[-1]["text"] += text
        elif "application/vnd.jupyter.widget-view+json" not in data:
            outputs.append(output)
    return outputs


def main() -> int:
    """Run the named notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="as inside_a_gpt; default: all")
    names = parser.parse_args().names
    unknown = {*names} - {source.stem for source in sources()}
    if unknown:
        parser.error(f"there is no notebook {', '.join(sorted(unknown))}")
    NOTEBOOKS.mkdir(exist_ok=True)
    for source in sources():
        if not names or source.stem in names:
            path = NOTEBOOKS / f"{source.stem}.ipynb"
            path.write_text(run(notebook_of(source)), encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size >> 10} KB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
