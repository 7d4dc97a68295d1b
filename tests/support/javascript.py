"""Modules of the pages, run by Node.js."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from nanovllm.pages import ASSETS
from nanovllm.pages.bundle import bundle
from tests.support.requirements import missing


def run_module(folder: Path, source: str) -> Any:
    """Return the last line that a module prints, as JSON; it may import those of the pages.

    Where Node.js is not installed, the test is skipped, or fails in CI.
    """
    node = shutil.which("node")
    if node is None:
        missing("Node.js is not installed")
    modules = shutil.copytree(ASSETS, folder / "modules", dirs_exist_ok=True)
    (modules / "test.js").write_text(source, encoding="utf-8")
    command = [node, "-e", bundle(modules, "test.js")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])
