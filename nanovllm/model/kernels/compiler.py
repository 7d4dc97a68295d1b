"""How kernels are compiled: one decorator for all of them, and how wide this machine's vectors are."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.extending
from llvmlite import binding

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile with Numba when first called: without the interpreter's lock, without exceptions, without fast-math.

    Fast-math would let the compiler reorder sums, and then a row's bits would depend on the tile it is computed in.
    """
    return cast("F", numba.njit(nogil=True, error_model="numpy", boundscheck=False, fastmath=False)(function))


def intrinsic(function: Callable[..., Any]) -> Any:
    """A function for compiled code whose code `function` generates; see numba.extending.intrinsic."""
    return numba.extending.intrinsic(function)


def host_lanes() -> int:
    """How many float32 a vector register of this machine holds: 16 with AVX-512, 8 with AVX2, otherwise 4."""
    features = dict(binding.get_host_cpu_features())
    if features.get("avx512f") and features.get("avx512vl"):
        return 16
    return 8 if features.get("avx2") and features.get("fma") else 4
