"""The docstring of each package lists its modules and subpackages, a line each."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in (ROOT / "nanovllm").rglob("__init__.py"))
_ENTRY = re.compile(r"(?m)^ *(?:- )?`?(\w+)(?:/|\.py)?`?(?::|  )")


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_docstring_lists_every_module_and_subpackage(folder: Path) -> None:
    source = (folder / "__init__.py").read_text(encoding="utf-8")
    listed = set(_ENTRY.findall(ast.get_docstring(ast.parse(source)) or ""))
    modules = {module.name for module in pkgutil.iter_modules([str(folder)])} - {"__main__"}
    assert modules <= listed, f"not listed: {', '.join(sorted(modules - listed))}"
