"""The type checker of the tests' import hook checks every new case of a function's calls."""

from typing import Any, Literal

import numpy as np
import pytest
from jaxtyping import Float32, TypeCheckError

from tests.support.shape_checks import check_once_per_case

TWO_BY_THREE, TWO_BY_FOUR, FOUR_BY_THREE = (
    np.ones(shape, dtype=np.float32) for shape in ((2, 3), (2, 4), (4, 3))
)
Matrix = Float32[np.ndarray, "rows columns"]


@check_once_per_case
def add(left: Matrix, right: Matrix, result: Any) -> Matrix:
    return result  # type: ignore[no-any-return]


@check_once_per_case
def reduce(matrices: list[Matrix], kind: Literal["sum", "mean"]) -> tuple[Matrix, int]:
    return matrices[0], len(matrices)


@pytest.fixture(autouse=True)
def passed() -> None:
    """Let valid calls pass first, which must excuse no other call."""
    add(TWO_BY_THREE, TWO_BY_THREE, TWO_BY_THREE)
    add(TWO_BY_THREE, right=TWO_BY_THREE, result=TWO_BY_THREE)
    add(FOUR_BY_THREE, FOUR_BY_THREE, FOUR_BY_THREE)
    reduce([TWO_BY_THREE], "sum")


@pytest.mark.parametrize(
    "arguments",
    [
        (TWO_BY_THREE, FOUR_BY_THREE, TWO_BY_THREE),
        (TWO_BY_FOUR, TWO_BY_THREE, TWO_BY_THREE),
        (TWO_BY_THREE, TWO_BY_THREE, FOUR_BY_THREE),
        (TWO_BY_THREE, TWO_BY_THREE.astype(np.float64), TWO_BY_THREE),
        (TWO_BY_THREE, TWO_BY_THREE, TWO_BY_THREE.astype(np.float64)),
        (TWO_BY_THREE, TWO_BY_THREE[0], TWO_BY_THREE),
        (TWO_BY_THREE, TWO_BY_THREE.tolist(), TWO_BY_THREE),
        (TWO_BY_THREE, TWO_BY_THREE, None),
    ],
    ids=["rows", "columns", "result", "dtype", "result's dtype", "dimensions", "type", "None"],
)
def test_another_shape_dtype_or_type_is_refused_each_time(arguments: tuple[Any, Any, Any]) -> None:
    left, right, result = arguments
    for _ in range(2):
        with pytest.raises(TypeCheckError):
            add(*arguments)
        with pytest.raises(TypeCheckError):
            add(left, right=right, result=result)


def test_items_and_strings_are_checked_each_time() -> None:
    with pytest.raises(TypeCheckError):
        reduce([TWO_BY_THREE[0]], "sum")
    with pytest.raises(TypeCheckError):
        reduce([TWO_BY_THREE], "product")  # type: ignore[arg-type]


def test_a_function_within_a_function_is_not_wrapped() -> None:
    def halve(matrix: Matrix) -> Matrix:
        return matrix / 2

    assert check_once_per_case(halve) is halve
