"""What step 12 must do.

Nothing is timed. Python runs the functions on small arrays, where an index beyond an edge raises an
exception; then they run compiled. What makes them fast is checked where it shows without a clock:
the order in which memory is read, and the instructions that the compiler has chosen.
"""

import itertools
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.learn.checking import Case, require
from nanovllm.learn.steps.step12_fast.interpreted import WatchedRange, interpreted
from nanovllm.learn.steps.step12_fast.mistakes import MISTAKES

__all__ = ["CASES", "MISTAKES"]

_SIZES = ((2, 4, 4), (7, 5, 9), (1, 6, 3), (3, 1, 1))
"""Tokens, d_in and d_out: a multiple of the tile, and sizes that no tile divides."""


def _arrays(tokens: int, d_in: int, d_out: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(tokens + d_in + d_out)
    rows, weight = random.normal(size=(tokens, d_in)), random.normal(size=(d_in, d_out))
    return rows.astype(np.float32), weight.astype(np.float32)


def _packed(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight.T)


def _unchanged(weight: np.ndarray) -> np.ndarray:
    return weight


def _spoil_memory(shape: tuple[int, ...]) -> None:
    """Leave NaN in the memory that NumPy takes for the next small arrays of this shape."""
    arrays = [np.full(shape, np.nan, dtype=np.float32) for _ in range(16)]
    arrays.clear()


def _result(found: Any) -> dict[str, object]:
    return {
        "the result": found,
        "the type of the result": str(getattr(found, "dtype", type(found).__name__)),
    }


def _small(name: str, prepare: Callable[[np.ndarray], np.ndarray]) -> Case:
    """Return a case that Python runs on several sizes."""

    def run(module: ModuleType) -> object:
        function, results = interpreted(module, name), {}
        for tokens, d_in, d_out in _SIZES:
            rows, weight = _arrays(tokens, d_in, d_out)
            second = prepare(weight)
            _spoil_memory((tokens, d_out))
            sizes = f"[{tokens}, {d_in}] @ [{d_in}, {d_out}]:"
            results[sizes] = _result(function(rows, second))
        return results

    def expected() -> object:
        return {
            f"[{tokens}, {d_in}] @ [{d_in}, {d_out}]:": _result(
                np.matmul(*_arrays(tokens, d_in, d_out))
            )
            for tokens, d_in, d_out in _SIZES
        }

    return Case(f"{name}: sizes that no tile divides", run, expected)


def _on_paper(module: ModuleType) -> object:
    rows, weight = np.array([[1, 2]], dtype="f4"), np.array([[3, 4], [5, 6]], dtype="f4")
    return module.matmul_plain(rows, weight)


class _Recorded(np.ndarray):
    """An array that records which elements are read."""

    reads: list[Any]

    def __getitem__(self, index: Any) -> Any:
        self.reads.append(index)
        return np.asarray(self)[index]


def _order(module: ModuleType) -> object:
    """Count how often the element below the one before is read next."""
    rows, weight = _arrays(4, 6, 5)
    recorded = weight.view(_Recorded)
    recorded.reads = []
    interpreted(module, "matmul_reordered")(rows, recorded)
    places = [index for index in recorded.reads if isinstance(index, tuple)]
    down = sum(second == (first[0] + 1, first[1]) for first, second in itertools.pairwise(places))
    return {"number of steps down a column of the weight": down}


def _pack(module: ModuleType) -> object:
    weight = _arrays(4, 6, 5)[1]
    found = module.pack(weight)
    is_contiguous = isinstance(found, np.ndarray) and bool(found.flags["C_CONTIGUOUS"])
    return {**_result(found), "the result is contiguous": is_contiguous}


def _tile(i: int, j: int) -> Callable[[ModuleType], object]:
    def run(module: ModuleType) -> object:
        rows, weight = _arrays(7, 6, 9)
        out = np.full((7, 9), 100, dtype=np.float32)
        interpreted(module, "multiply_tile")(rows, _packed(weight), out, i, j)
        return {"out, which was 100 everywhere": out}

    return run


def _expected_tile(i: int, j: int) -> Callable[[], object]:
    def run() -> object:
        rows, weight = _arrays(7, 6, 9)
        out = np.full((7, 9), 100, dtype=np.float32)
        out[i : i + 2, j : j + 4] = rows[i : i + 2] @ weight[:, j : j + 4]
        return {"out, which was 100 everywhere": out}

    return run


def _threads(module: ModuleType) -> object:
    """Run the iterations of `prange` one after the other, and see what each one writes."""
    rows, weight = _arrays(7, 5, 9)
    watched = WatchedRange()
    _spoil_memory((7, 9))
    found = interpreted(module, "matmul_parallel", watched)(rows, _packed(weight))
    return {
        "several iterations of prange": watched.iterations > 1,
        "step of prange": watched.step,
        "number of elements that two iterations write": watched.num_shared,
        **_result(found),
    }


def _compiled(name: str, prepare: Callable[[np.ndarray], np.ndarray]) -> Case:
    """Return a case that runs compiled code."""

    def run(module: ModuleType) -> object:
        function = getattr(module, name)
        is_compiled = hasattr(function, "py_func")
        require(is_compiled, f"{name} is not compiled: write @numba.njit above it")
        rows, weight = _arrays(37, 50, 41)
        found = _result(function(rows, prepare(weight)))
        if name == "matmul_tiled":
            parts = (module.multiply_tile, function)
            code = "".join(text for part in parts for text in part.inspect_llvm().values())
            found["vectors of partial sums"] = bool(
                re.search(r"(fast|reassoc)[^\n]*<\d+ x float>", code)
            )
            found["it computes in float64"] = bool(re.search(r"= f(mul|add)[^\n]*double", code))
        return found

    def expected() -> object:
        found = _result(np.matmul(*_arrays(37, 50, 41)))
        if name == "matmul_tiled":
            found |= {"vectors of partial sums": True, "it computes in float64": False}
        return found

    return Case(f"{name}: compiled", run, expected)


CASES = (
    Case(
        "matmul_plain: one row on paper",
        _on_paper,
        lambda: np.array([[13, 16]], dtype="f4"),
        "1 * 3 + 2 * 5, and 1 * 4 + 2 * 6.",
    ),
    _small("matmul_plain", _unchanged),
    _small("matmul_numba", _unchanged),
    _small("matmul_reordered", _unchanged),
    Case(
        "matmul_reordered: along the rows of the weight",
        _order,
        lambda: {"number of steps down a column of the weight": 0},
        "Elements below each other are far apart in memory; those of a row share cache lines.",
    ),
    Case(
        "pack: columns become rows",
        _pack,
        lambda: {**_result(_arrays(4, 6, 5)[1].T), "the result is contiguous": True},
    ),
    Case("multiply_tile: in the middle", _tile(2, 4), _expected_tile(2, 4)),
    Case(
        "multiply_tile: at both edges",
        _tile(6, 8),
        _expected_tile(6, 8),
        "Compiled code does not check an index: beyond the edge it changes other memory.",
    ),
    _small("matmul_tiled", _packed),
    Case(
        "matmul_parallel: iterations do not disturb each other",
        _threads,
        lambda: {
            "several iterations of prange": True,
            "step of prange": 1,
            "number of elements that two iterations write": 0,
            **_result(np.matmul(*_arrays(7, 5, 9))),
        },
        "Threads run iterations at the same time. Where two add to one element, one sum is lost.",
    ),
    _small("matmul_parallel", _packed),
    _compiled("matmul_tiled", _packed),
    _compiled("matmul_numba", _unchanged),
    _compiled("matmul_reordered", _unchanged),
    _compiled("matmul_parallel", _packed),
)
