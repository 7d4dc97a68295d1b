"""Cases and mistakes of a step, and what differs between two results.

A case calls the reader's functions and returns what they gave: arrays, numbers, text, or containers
of them. The same case on the project's code gives what is expected. A mistake is a solution with
one passage replaced: where it gives in every case what the reader's code gave, it is named.
"""

import dis
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.errors import counted
from nanovllm.learn.readers_lines import readers_lines

RELATIVE, ABSOLUTE = 1e-4, 1e-5
"""Largest difference of an element: RELATIVE of the largest element of the array, and ABSOLUTE."""
_SHOWN = 60  # characters of a value in a message
_NAN = "not a number (NaN)"
_NAN_CAUSES = "0 / 0, inf / inf, inf - inf, 0 * inf, or a root or logarithm of a negative number"
_MAX_SHOWN = 12  # elements of an array that is shown whole


@dataclass(frozen=True, slots=True)
class Case:
    """What is checked.

    Attributes:
        name: what must hold, such as "a later token changes nothing".
        run: calls the functions of a step's module and returns what they gave.
        expected: what `run` must give; None for what it gives on the solution.
        lesson: what to think of where it fails.
    """

    name: str
    run: Callable[[ModuleType], object]
    expected: Callable[[], object] | None = None
    lesson: str = ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """A common mistake: the solution with `old`, which it has once, replaced by `new`.

    Attributes:
        name: a few words, such as "no scale".
        text: what is wrong, and what it causes.
    """

    name: str
    text: str
    old: str
    new: str


class UnmetError(Exception):
    """A requirement of a case does not hold; the message says which."""


def require(condition: object, text: str) -> None:
    """Raise UnmetError unless the condition holds."""
    if not condition:
        raise UnmetError(text)


class Calls:
    """A list of calls and what they returned, for cases of objects with state.

    `difference` names the first call whose result differs.
    """

    def __init__(self) -> None:
        """Start without calls."""
        self.items: list[tuple[str, object]] = []

    def add(self, text: str, value: object) -> None:
        """Add a call and a copy of its result."""
        self.items.append((text, list(value) if isinstance(value, list) else value))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case gave: a value; or what it raised, as the kind of the exception and a message.

    Attributes:
        value: what the case returned.
        kind: name of the exception; "unmet" or "unwritten" for those of the case.
        text: its message, with the line of the reader's file.
        words: those of the message; none where the code raised it with words of its own.
        invalid: the first line of the reader's file with an operation that gave NaN.
    """

    value: object = None
    kind: str = ""
    text: str = ""
    words: frozenset[str] = frozenset()
    invalid: str = ""


def run_case(case: Case, module: ModuleType, folder: Path) -> Outcome:
    """Run a case on a module; messages have the line of the reader's `folder` that raised."""
    invalid: list[str] = []

    def on_invalid(_kind: str, _flag: int) -> None:
        if not invalid:
            invalid.extend(map(_place, readers_lines(None, folder)[-1:]))

    try:
        # What overflows differs from what is expected.
        with np.errstate(all="ignore", invalid="call", call=on_invalid):
            value = case.run(module)
        return Outcome(value, invalid="".join(invalid))
    except UnmetError as error:
        return Outcome(kind="unmet", text=str(error), words=_words(error, module))
    except NotImplementedError as error:
        return Outcome(kind="unwritten", text=str(error) or "a part is not written yet")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the reader's code may raise anything
        text, words = _raised(error, folder), _words(error, module)
        return Outcome(kind=type(error).__name__, text=text, words=words)


def is_same(first: Outcome, second: Outcome) -> bool:
    """Return whether two outcomes are those of the same mistake."""
    if (first.kind, first.words) != (second.kind, second.words):
        return False
    return first.kind != "" or difference(first.value, second.value) is None


def problem_of(outcome: Outcome, expected: object) -> str | None:
    """Return what differs first in the value of an outcome, and where NaN comes from."""
    text = difference(outcome.value, expected)
    if text is None or _NAN not in text:
        return text
    first = f"\n  the first NaN is from {outcome.invalid}" if outcome.invalid else ""
    return f"{text}{first}\n  NaN is {_NAN_CAUSES}"


def difference(found: object, expected: object, name: str = "the result") -> str | None:
    """Return what differs first; None if nothing does."""
    if isinstance(expected, Calls):
        return _calls_difference(found, expected)
    if isinstance(expected, Mapping):
        start = "" if name == "the result" else name
        pairs = [(f"{start} {key}".strip(), key) for key in expected]
        assert isinstance(found, Mapping), "both come from the same case"
        return _first(difference(found[key], expected[key], text) for text, key in pairs)
    if isinstance(expected, np.ndarray):
        return _array_difference(found, expected, name)
    if isinstance(expected, list | tuple):
        return _sequence_difference(found, expected, name)
    return _scalar_difference(found, expected, name)


def _scalar_difference(found: object, expected: object, name: str) -> str | None:
    if isinstance(expected, float | np.floating):
        if not _is_number(found):
            return _type_difference(found, "a number", name)
        return _array_difference(np.asarray(found), np.asarray(expected), name)
    if isinstance(expected, int | np.integer) and not isinstance(expected, bool):
        if not isinstance(found, int | np.integer) or isinstance(found, bool):
            return _type_difference(found, "a whole number", name)
    elif isinstance(found, np.ndarray) or type(found) is not type(expected):
        kind = "" if expected is None else f"{_article(expected)}: "
        return _type_difference(found, f"{kind}{_short(expected)}", name)
    if found != expected:
        return f"{name}: found {_short(found)}, expected {_short(expected)}"
    return None


def _calls_difference(found: object, expected: Calls) -> str | None:
    assert isinstance(found, Calls), "both come from the same case"
    for index, (text, value) in enumerate(expected.items):
        if index == len(found.items):
            return f"{text} was not reached"
        other, given = found.items[index]
        if other != text:
            return f"after {_before(found, index)}: {other} was called, expected {text}"
        problem = difference(given, value, text)
        if problem is not None:
            return f"{problem}\n  the calls before it: {_before(found, index)}"
    more = found.items[len(expected.items) :]
    return f"{more[0][0]} was one call more than expected" if more else None


def _before(calls: Calls, index: int) -> str:
    """Return the four calls before one."""
    texts = [text.rstrip(",") for text, _ in calls.items[max(0, index - 4) : index]]
    return "; ".join(texts) or "none"


def _sequence_difference(
    found: object, expected: "list[Any] | tuple[Any, ...]", name: str
) -> str | None:
    if not isinstance(found, list | tuple):
        return _type_difference(found, f"{_article(expected)} of {_items(expected)}", name)
    if len(found) != len(expected):
        return (
            f"{name} has {_items(found)}, expected {len(expected)}: "
            f"found {_short(found)}, expected {_short(expected)}"
        )
    places = range(len(expected))
    return _first(difference(found[at], expected[at], f"{name}, item {at}") for at in places)


def _array_difference(found: object, expected: "np.ndarray[Any, Any]", name: str) -> str | None:
    if not isinstance(found, np.ndarray | np.generic):
        return _type_difference(found, f"an array of shape {expected.shape}", name)
    found = np.asarray(found)
    if found.shape != expected.shape:
        return f"{name} has the shape {found.shape}, expected {expected.shape}"
    is_bool = found.dtype == np.bool_ != expected.dtype
    if is_bool or not np.can_cast(found.dtype, expected.dtype, "same_kind"):
        return f"{name} has elements of type {found.dtype}, expected {expected.dtype}"
    wide = found.astype(np.float64), expected.astype(np.float64)
    finite = np.abs(wide[1][np.isfinite(wide[1])])
    limit = ABSOLUTE + RELATIVE * float(finite.max(initial=0.0))
    with np.errstate(invalid="ignore"):
        is_close = np.abs(wide[0] - wide[1]) <= limit
    is_close |= (wide[0] == wide[1]) | (np.isnan(wide[0]) & np.isnan(wide[1]))
    if is_close.all():
        return None
    first = tuple(int(place) for place in np.argwhere(~is_close)[0])
    where = f" at {list(first)}" if first else ""
    count = f"{int((~is_close).sum())} of {found.size} elements differ, the first{where}: "
    shown = [_one_line(array[first]) for array in (found, expected)]
    text = f"{name}: {count if found.size > 1 else ''}found {shown[0]}, expected {shown[1]}"
    text += _relation(*wide)
    if 1 < found.size <= _MAX_SHOWN:
        text += f"\n  found    {_one_line(found)}\n  expected {_one_line(expected)}"
    return text


def _one_line(values: "np.ndarray[Any, Any]") -> str:
    return " ".join(np.array2string(values, precision=4, suppress_small=True).split())


def _relation(found: "np.ndarray[Any, Any]", expected: "np.ndarray[Any, Any]") -> str:
    """Return how the arrays are related where that is plain, as the end of a message."""
    if np.isnan(found).any() and not np.isnan(expected).any():
        first = f", the first at {np.argwhere(np.isnan(found))[0].tolist()}" if found.ndim else ""
        count = int(np.isnan(found).sum())
        return f"; {count} {'is' if count == 1 else 'are'} {_NAN}{first}"
    if found.size > 1 and np.isfinite(expected).all() and np.isfinite(found).all():
        square = found.ndim > 1 and found.shape[-1] == found.shape[-2]
        if square and np.allclose(found, np.swapaxes(expected, -1, -2), RELATIVE, ABSOLUTE):
            return "; it is the transpose of what is expected"
        largest = np.unravel_index(np.abs(expected).argmax(), expected.shape)
        factor = found[largest] / expected[largest] if expected[largest] else math.nan
        if np.allclose(found, factor * expected, RELATIVE, ABSOLUTE) and factor:
            return f"; every element is {factor:.4g} times what is expected"
    return ""


def _type_difference(found: object, expected: str, name: str) -> str:
    if found is None:
        return (
            f"{name} is None, expected {expected}; no `return` was reached: is one missing, or "
            "does a loop end without finding anything?"
        )
    return f"{name} is {_article(found)} ({_short(found)}), expected {expected}"


def _is_number(value: object) -> bool:
    is_scalar = isinstance(value, np.ndarray) and value.shape == ()
    return is_scalar or isinstance(value, int | float | np.generic)


def _article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _items(values: "list[Any] | tuple[Any, ...]") -> str:
    return counted(len(values), "item")


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _words(error: BaseException, module: ModuleType) -> frozenset[str]:
    """Return the words of a message; none where a `raise` of `module` itself has chosen them.

    Only of the first line: the others of Numba's name places in the file. A set, because the shapes
    of `a -= b` are those of `a - b`, and one of them again.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    code, is_own = last.tb_frame.f_code, last.tb_frame.f_globals is vars(module)
    if is_own and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS":
        return frozenset()
    return frozenset(str(error).partition("\n")[0].split())


def _raised(error: BaseException, folder: Path) -> str:
    """Return an exception's message with the last line of the reader's file that led to it."""
    lines = readers_lines(error, folder)
    message = re.sub(r"\x1b\[\d*m", "", str(error))  # Numba's are bold
    if len(message) > 300:
        message = f"{' '.join(message.split())[:300]}..."
    text = f"{type(error).__name__}: {message}"
    return f"{text}\n  {_place(lines[-1])}" if lines else text


def _place(line: FrameSummary) -> str:
    return f"line {line.lineno}: {line.line}"
