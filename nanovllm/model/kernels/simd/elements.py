"""Loops over elements of float32 arrays of any length: whole vectors, then one element at a time.

One of the last elements is computed as a vector of copies of it, so its bits are those that it
would have inside a vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


@dataclass(frozen=True, slots=True)
class Elements:
    """The elements of an iteration: `lanes` adjacent ones, or a single one in every lane.

    Attributes:
        v: emits the code.
        index: index of the first element.
        is_single: whether it is a single one.
    """

    v: Vectors
    index: Value
    is_single: bool

    def load(self, base: Value) -> Value:
        """Load these elements of a float32 array."""
        element_ptr = self.v.element(base, self.index)
        if self.is_single:
            return self.v.splat(self.v.load_scalar(element_ptr))
        return self.v.load(element_ptr)

    def store(self, value: Value, base: Value, element_bytes: int = 4) -> None:
        """Store a result for each of these elements of an array of numbers of so many bytes."""
        self.v.store(value.lane(0) if self.is_single else value, base + self.index * element_bytes)

    def without_copies(self, x: Value) -> Value:
        """Return x in the lanes that have an element of their own, 0 in those with a copy."""
        return self.v.where(self.v.first_lanes(self.v.scalar(1)), x, 0.0) if self.is_single else x


def fold_elements(
    v: Vectors,
    count: Value,
    carried: Sequence[Value],
    body: Callable[[Elements, list[Value]], Sequence[Value]],
) -> list[Value]:
    """Emit `carried = body(elements, carried)` over `count` elements; return `carried`.

    `body` is called twice, to emit the code of whole vectors and that of single elements.
    """
    whole = count & -v.lanes
    carried = v.loop(
        whole, v.lanes, carried, lambda i, now: body(Elements(v, i, is_single=False), now)
    )
    return v.loop(
        count - whole, 1, carried, lambda i, now: body(Elements(v, whole + i, is_single=True), now)
    )


def for_elements(v: Vectors, count: Value, body: Callable[[Elements], None]) -> None:
    """Emit `body(elements)` over `count` elements; see `fold_elements`."""

    def without_carried(elements: Elements, _: list[Value]) -> list[Value]:
        body(elements)
        return []

    fold_elements(v, count, [], without_carried)


def map_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    compute: Callable[..., Sequence[Value]],
) -> None:
    """Emit outputs[i] = compute(*inputs[i]) for each i below `count`.

    `inputs` and `outputs` are addresses of float32 arrays; an input may be an output too.
    """

    def body(elements: Elements) -> None:
        results = compute(*(elements.load(base) for base in inputs))
        for result, base in zip(results, outputs, strict=True):
            elements.store(result, base)

    for_elements(v, count, body)


def sum_elements(
    v: Vectors,
    count: Value,
    inputs: Sequence[Value],
    sums: int,
    compute: Callable[..., Sequence[Value]],
) -> list[Value]:
    """Return the `sums` sums of compute(*inputs[i]) over each i below `count`, as scalars."""

    def add(elements: Elements, totals: list[Value]) -> list[Value]:
        terms = compute(*(elements.load(base) for base in inputs))
        return [
            total + elements.without_copies(term) for total, term in zip(totals, terms, strict=True)
        ]

    totals = fold_elements(v, count, [v.constant(0.0)] * sums, add)
    return [v.sum(total) for total in totals]
