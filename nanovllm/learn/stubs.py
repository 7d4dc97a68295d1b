"""The file with which a reader starts a step: the solution without its bodies.

Signatures and docstrings exist once, in the solution. A function or a class whose first line ends
with `# given` is kept whole; names with an underscore that are not given are left out.
"""

import ast
import functools
import re

from nanovllm.learn.course import Step

GIVEN = "# given"
_PACKAGE = "nanovllm.learn.steps."


def readers_source(source: str) -> str:
    """Return a solution as a file of the reader's folder, which imports the files beside it."""
    pattern = rf"(?m)^from {re.escape(_PACKAGE)}(\w+)\.solution import"
    return re.sub(pattern, r"from \1 import", source)


def stub_of(step: Step) -> str:
    """Return the stub of a step."""
    source = step.text("solution.py")
    lines = source.splitlines()
    removed: set[int] = set()
    inserted: dict[int, str] = {}
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            _strip(node, lines, removed, inserted, f"step {step.number}: {node.name}")
        elif isinstance(node, ast.ClassDef) and not _is_given(node, lines):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    name = f"step {step.number}: {node.name}.{item.name}"
                    _strip(item, lines, removed, inserted, name)
    kept = []
    for number, line in enumerate(lines, 1):
        if number in inserted:
            kept.append(inserted[number])
        if number not in removed:
            kept.append(line.removesuffix(GIVEN).rstrip())
    return _without_gaps(readers_source("\n".join(kept)))


@functools.cache
def names_to_write(step: Step) -> tuple[str, ...]:
    """Return the functions and classes that a step asks for, in order."""
    return tuple(stub_names(stub_of(step)))


def stub_names(source: str) -> dict[str, None]:
    """Return the functions and classes of a file whose bodies are not all written, in order."""
    unwritten = dict[str, None]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and _is_stub(node):
            unwritten[node.name] = None
        if isinstance(node, ast.ClassDef) and any(
            isinstance(item, ast.FunctionDef) and _is_stub(item) for item in node.body
        ):
            unwritten[node.name] = None
    return unwritten


def _strip(
    node: ast.FunctionDef,
    lines: list[str],
    removed: set[int],
    inserted: dict[int, str],
    name: str,
) -> None:
    """Remove the body of a function behind its docstring, or a private function as a whole."""
    if _is_given(node, lines):
        return
    assert node.end_lineno is not None
    is_private = node.name.startswith("_") and not node.name.endswith("__")
    if is_private:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        removed.update(range(first, node.end_lineno + 1))
        return
    start = node.body[0].end_lineno if ast.get_docstring(node) else None
    first = start + 1 if start is not None else node.body[0].lineno
    removed.update(range(first, node.end_lineno + 1))
    indent = " " * node.body[0].col_offset
    inserted[first] = f'{indent}raise NotImplementedError("{name} is not written yet")'


def _is_given(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> bool:
    return lines[node.lineno - 1].endswith(GIVEN)


def _is_stub(node: ast.FunctionDef) -> bool:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if len(body) != 1 or not isinstance(body[0], ast.Raise):
        return False
    return "NotImplementedError" in ast.dump(body[0])


def _without_gaps(source: str) -> str:
    """Return the source with at most two empty lines in a row."""
    while "\n\n\n\n" in source:
        source = source.replace("\n\n\n\n", "\n\n\n")
    return source.rstrip() + "\n"
