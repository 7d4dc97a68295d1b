"""The reader's parts, and the project's solution for each that is not written yet.

The files of the reader's folder import each other by name: `from step03_layer_norm import
layer_norm`. They are loaded in the order of the steps. What is still a stub in one file is replaced
before the next one is loaded, so everything runs from the first day.
"""

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from importlib.abc import InspectLoader, Loader
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from nanovllm.errors import NanovllmError
from nanovllm.learn.checking import Mistake
from nanovllm.learn.course import STEPS, Step
from nanovllm.learn.stubs import stub_names


class ReadersCodeError(NanovllmError):
    """A file of the reader's folder cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The module of each step, by its name.

    Attributes:
        modules: with the project's code where the reader has none.
        written: the reader's names of each module.
    """

    modules: dict[str, ModuleType]
    written: dict[str, tuple[str, ...]]

    def __getitem__(self, module: str) -> ModuleType:
        """Return a step's module."""
        return self.modules[module]


def names_of(module: ModuleType) -> list[str]:
    """Return the public functions and classes that a solution defines."""
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def load_parts(folder: Path | None, last: int = len(STEPS), *, falls_back: bool = True) -> Parts:
    """Load the reader's files of the steps up to `last`; None for the project's code alone.

    Args:
        folder: the reader's folder.
        last: number of the last step.
        falls_back: replace stubs of the last step too; of those before it they always are.

    Raises:
        ReadersCodeError: a file cannot be read or raises an exception.
    """
    modules: dict[str, ModuleType] = {}
    written: dict[str, tuple[str, ...]] = {}
    for step in STEPS[:last]:
        path = None if folder is None else folder / f"{step.module}.py"
        if path is None or not path.exists():
            modules[step.module] = sys.modules[step.module] = step.solution
            written[step.module] = ()
            continue
        source = _read(path)
        module = _load(step, path)
        unwritten = stub_names(source) | set(names_of(step.solution)) - set(vars(module))
        names = names_of(step.solution)
        if falls_back or step.number < last:
            for name in unwritten & set(names):
                setattr(module, name, getattr(step.solution, name))
        modules[step.module] = module
        written[step.module] = tuple(name for name in names if name not in unwritten)
    return Parts(modules, written)


class _Source(InspectLoader):
    """Loads a module from its text."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source


def mistaken(step: Step, mistake: Mistake) -> ModuleType:
    """Return the solution with a mistake in it."""
    source = step.text("solution.py")
    assert source.count(mistake.old) == 1, f"{mistake.name}: it must replace exactly one passage"
    loader = _Source(source.replace(mistake.old, mistake.new))
    return _execute(f"{step.module}_mistaken", loader)


def _read(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
        compile(source, str(path), "exec")
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise ReadersCodeError(f"{path.name}, line {error.lineno}: {error.msg}: {text}") from None
    except (OSError, ValueError) as error:
        raise ReadersCodeError(f"{path} cannot be read: {error}") from None
    return source


def _load(step: Step, path: Path) -> ModuleType:
    """Import a file of the reader under the step's name."""
    try:
        return _execute(step.module, SourceFileLoader(step.module, str(path)))
    except MemoryError:
        raise
    except Exception as error:
        tail = error.__traceback__
        while tail is not None and tail.tb_next is not None:
            tail = tail.tb_next
        line = f", line {tail.tb_lineno}" if tail is not None else ""
        raise ReadersCodeError(f"{path.name}{line}: {type(error).__name__}: {error}") from error


def _execute(name: str, loader: Loader) -> ModuleType:
    """Import a module, which its name finds from now on."""
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module
