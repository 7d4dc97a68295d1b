"""The reader's parts, and the project's solution for each that is not written yet.

The files of the reader's folder import each other by name: `from step03_layer_norm import
layer_norm`. They are loaded in the order of the steps. What is still a stub in one file is replaced
before the next one is loaded, so everything runs from the first day. A check loads one step alone,
so that no mistake of another step is taken for one of this.
"""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import ExecutionLoader, Loader
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NoReturn

from nanovllm.errors import NanovllmError
from nanovllm.learn.checking import Mistake
from nanovllm.learn.course import STEPS, Step
from nanovllm.learn.readers_lines import readers_lines
from nanovllm.learn.stubs import names_to_write, stub_names


class ReadersCodeError(NanovllmError):
    """A file of the reader's folder cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The module of each step, by its name.

    Attributes:
        modules: with the project's code where the reader has none.
        written: what the reader has written of each module, without what was given.
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
        if (inspect.isfunction(_unwrapped(value)) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def functions_of(step: Step, module: ModuleType) -> dict[str, FunctionType]:
    """Return the functions and methods that a step asks for, such as "encode" or "Cache.read"."""
    found: dict[str, object] = {}
    for name in names_to_write(step):
        value = getattr(module, name, None)
        if inspect.isclass(value):
            found |= {f"{name}.{method}": one for method, one in vars(value).items()}
        else:
            found[name] = value
    return {name: one for name, one in found.items() if inspect.isfunction(one)}


def _unwrapped(value: object) -> object:
    """Return the function that Numba compiles; anything else as it is."""
    return getattr(value, "py_func", value)


def load_parts(folder: Path | None, steps: Sequence[Step] = STEPS) -> Parts:
    """Load the reader's files of some steps; None for the project's code alone.

    Raises ReadersCodeError if a file cannot be read or raises an exception.
    """
    modules: dict[str, ModuleType] = {}
    written: dict[str, tuple[str, ...]] = {}
    for step in steps:
        path = None if folder is None else folder / f"{step.module}.py"
        if path is None or not path.exists():
            modules[step.module] = sys.modules[step.module] = step.solution
            written[step.module] = ()
            continue
        modules[step.module], unwritten = _load(step, path)
        for name in unwritten:
            setattr(modules[step.module], name, getattr(step.solution, name))
        written[step.module] = tuple(name for name in names_to_write(step) if name not in unwritten)
    return Parts(modules, written)


def load_step(folder: Path, step: Step) -> ModuleType:
    """Load the reader's file of one step, with the project's code of the others.

    A name that is missing in it raises NotImplementedError when it is called. Raises
    ReadersCodeError as `load_parts` does.
    """
    load_parts(None, STEPS[: step.number - 1])
    module, unwritten = _load(step, folder / f"{step.module}.py")
    for name in unwritten - set(vars(module)):
        setattr(module, name, _missing(step, name))
    return module


def _missing(step: Step, name: str) -> Callable[..., NoReturn]:
    """Return what takes the place of a function or class that is not in the reader's file."""

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{step.module}.py defines no {name}")

    return missing


class _Source(ExecutionLoader):
    """Loads a module from its text, and writes no compiled file beside it."""

    def __init__(self, source: str, path: str) -> None:
        """Name `path` in tracebacks."""
        self._source, self._path = source, path

    def get_filename(self, fullname: str) -> str:
        """Return the path."""
        return self._path

    def get_source(self, fullname: str) -> str:
        """Return the text."""
        return self._source


@functools.cache
def mistaken(step: Step, mistake: Mistake) -> ModuleType:
    """Return the solution with a mistake in it."""
    source = step.text("solution.py")
    assert source.count(mistake.old) == 1, f"{mistake.name}: it must replace exactly one passage"
    loader = _Source(source.replace(mistake.old, mistake.new), "the solution with a mistake")
    return _execute(f"{step.module}_mistaken", loader)


def _load(step: Step, path: Path) -> tuple[ModuleType, set[str]]:
    """Import a file of the reader under the step's name; return what is not written in it too."""
    try:
        source = path.read_text(encoding="utf-8")
        unwritten = stub_names(source)
        module = _execute(step.module, _Source(source, str(path)))
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise ReadersCodeError(f"{path.name}, line {error.lineno}: {error.msg}: {text}") from None
    except OSError as error:
        raise ReadersCodeError(f"{path} cannot be read: {error}") from None
    except (Exception, SystemExit) as error:
        lines = readers_lines(error, path.parent)
        line = f", line {lines[-1].lineno}" if lines else ""
        raise ReadersCodeError(f"{path.name}{line}: {type(error).__name__}: {error}") from error
    names = set(names_of(step.solution))
    return module, names & (unwritten.keys() | names - set(vars(module)))


def _execute(name: str, loader: Loader) -> ModuleType:
    """Import a module, which its name finds from now on."""
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module
