"""Run tests/javascript: the modules of the pages that need no browser."""

import shutil
import subprocess
from pathlib import Path

from tests.support.requirements import missing

TESTS = Path(__file__).parents[1] / "javascript"


def test_modules_without_a_browser() -> None:
    node = shutil.which("node")
    if node is None:
        missing("Node.js is not installed")
    files = sorted(map(str, TESTS.glob("*.test.mjs")))
    assert files
    command = [node, "--test", *files]
    result = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout
