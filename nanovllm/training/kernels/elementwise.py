"""Loops over elements of arrays of any length: in vectors, and the rest one at a time.

An element of the rest is computed as a vector of copies of it, so its bits are those that it would
have inside a vector.
"""

from collections.abc import Callable, Sequence

from nanovllm.model.kernels.simd.vector import F32, I32, I64, Value, Vectors


def float_argument(v: Vectors, bits: Value) -> Value:
    """Return a float32 in every lane from the argument that has its bits."""
    return v.splat(v.builder.bitcast(v.builder.trunc(bits, I32), F32))


def map_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    compute: Callable[..., Sequence[Value]],
) -> None:
    """Emit outputs[i] = compute(inputs[i]) for each i below `count`.

    Args:
        v: emits the code.
        count: number of elements.
        inputs: addresses of float32 arrays, the vector arguments of `compute`.
        outputs: addresses of the results of `compute`; they may be inputs too.
        compute: emits the code of one vector; called twice.
    """
    map_indexed(v, count, inputs, outputs, lambda _, *vectors: compute(*vectors))


def map_indexed(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    compute: Callable[..., Sequence[Value]],
) -> None:
    """Emit map_elements with the index of the first lane as first argument of `compute`."""
    whole = v.builder.and_(count, I64(-v.lanes))

    def vector(i: Value, _: list[Value]) -> list[Value]:
        results = compute(i, *(v.load(v.element(base, i)) for base in inputs))
        for result, base in zip(results, outputs, strict=True):
            v.store(result, v.element(base, i))
        return []

    def rest(i: Value, _: list[Value]) -> list[Value]:
        index = v.builder.add(whole, i)
        values = (v.splat(v.load_scalar(v.element(base, index))) for base in inputs)
        results = compute(index, *values)
        for result, base in zip(results, outputs, strict=True):
            v.store(v.builder.extract_element(result, I32(0)), v.element(base, index))
        return []

    v.loop(whole, v.lanes, [], vector)
    v.loop(v.builder.sub(count, whole), 1, [], rest)


def sum_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    results: int,
    compute: Callable[..., Sequence[Value]],
) -> list[Value]:
    """Return the sums of compute(inputs[i]) over each i below `count`, as scalars.

    `results` is the number of values of `compute`, which is called twice. The order of addition
    depends on `count` alone.
    """
    whole = v.builder.and_(count, I64(-v.lanes))

    def vector(i: Value, totals: list[Value]) -> list[Value]:
        terms = compute(*(v.load(v.element(base, i)) for base in inputs))
        return [v.add(total, term) for total, term in zip(totals, terms, strict=True)]

    def rest(i: Value, totals: list[Value]) -> list[Value]:
        index = v.builder.add(whole, i)
        terms = compute(*(v.splat(v.load_scalar(v.element(base, index))) for base in inputs))
        scalars = [v.builder.extract_element(term, I32(0)) for term in terms]
        return [v.add(total, term) for total, term in zip(totals, scalars, strict=True)]

    totals = v.loop(whole, v.lanes, [v.constant(0.0)] * results, vector)
    return v.loop(v.builder.sub(count, whole), 1, [v.sum(total) for total in totals], rest)
