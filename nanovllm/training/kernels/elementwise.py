"""Loops over elements of arrays of any length: in vectors, and the rest one at a time.

An element of the rest is computed as a vector of copies of it, so its bits are those that it would
have inside a vector.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.vector import F32, I32, I64, Value, Vectors, kernel

Keep = Callable[[Value], Value]
"""Keep(x) -> x where the lane has an element of its own, 0 where it has a copy."""


def float_argument(v: Vectors, bits: Value) -> Value:
    """Return a float32 in every lane from the argument that has its bits."""
    return v.splat(v.builder.bitcast(v.builder.trunc(bits, I32), F32))


def fold_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    carried: Sequence[Value],
    compute: Callable[[list[Value], list[Value], Keep], tuple[list[Value], list[Value]]],
) -> list[Value]:
    """Emit outputs[i], carried = compute(inputs[i], carried, keep) for each i below `count`.

    Args:
        v: emits the code.
        count: number of elements.
        inputs: addresses of float32 arrays.
        outputs: addresses of the results; they may be inputs too.
        carried: values before the first element.
        compute: emits the code of one vector; called twice.

    Returns:
        The carried values after the last element.
    """
    whole = v.builder.and_(count, I64(-v.lanes))

    def vector(i: Value, carried: list[Value]) -> list[Value]:
        values = [v.load(v.element(base, i)) for base in inputs]
        results, carried = compute(values, carried, lambda x: x)
        for result, base in zip(results, outputs, strict=True):
            v.store(result, v.element(base, i))
        return carried

    def rest(i: Value, carried: list[Value]) -> list[Value]:
        index = v.builder.add(whole, i)
        values = [v.splat(v.load_scalar(v.element(base, index))) for base in inputs]
        results, carried = compute(
            values, carried, lambda x: v.where(v.first_lanes(I64(1)), x, v.constant(0.0))
        )
        for result, base in zip(results, outputs, strict=True):
            v.store(v.builder.extract_element(result, I32(0)), v.element(base, index))
        return carried

    carried = v.loop(whole, v.lanes, carried, vector)
    return v.loop(v.builder.sub(count, whole), 1, carried, rest)


def map_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    compute: Callable[..., list[Value]],
) -> None:
    """Emit outputs[i] = compute(*inputs[i]) for each i below `count`; see `fold_elements`."""
    fold_elements(v, count, inputs, outputs, [], lambda values, _, keep: (compute(*values), []))


def sum_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    sums: int,
    compute: Callable[..., Sequence[Value]],
) -> list[Value]:
    """Return the `sums` sums of compute(*inputs[i]) over each i below `count`, as scalars."""

    def add(
        values: list[Value], totals: list[Value], keep: Keep
    ) -> tuple[list[Value], list[Value]]:
        terms = compute(*values)
        return [], [v.add(total, keep(term)) for total, term in zip(totals, terms, strict=True)]

    totals = fold_elements(v, count, inputs, (), [v.constant(0.0)] * sums, add)
    return [v.sum(total) for total in totals]


def make_add(target: KernelTarget) -> Any:
    """Return add(a_ptr, b_ptr, out_ptr, count): out = a + b."""

    def add(v: Vectors, a_ptr: Value, b_ptr: Value, out_ptr: Value, count: Value) -> None:
        map_elements(v, count, (a_ptr, b_ptr), (out_ptr,), lambda a, b: [v.add(a, b)])

    return kernel(target, add)
