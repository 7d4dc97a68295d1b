"""What is done to a row of sums before it is stored: bias, then activation or residual.

out  = sums + bias
out  = activation(sums + bias)
out += sums + bias
"""

from collections.abc import Callable, Sequence
from typing import Any

from nanovllm.model.kernels.activation import ACTIVATIONS
from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.parameters import ACTIVATION_NAMES
from nanovllm.model.kernels.vector import Value, Vectors, kernel


def make_epilogue(lanes: int) -> Any:
    """epilogue(kind, sums, bias, out, columns): one row, whole vectors; `kind` is the number of an activation, STORE or ADD_TO_RESIDUAL."""

    def row(finish: Callable[[Vectors, Value, Value], Value]) -> Any:
        def body(v: Vectors, sums: Value, bias: Value, out: Value, columns: Value) -> None:
            def vector(i: Value, _: list[Value]) -> list[Value]:
                at = v.element(out, i)
                v.store(finish(v, v.add(v.load(v.element(sums, i)), v.load(v.element(bias, i))), at), at)
                return []

            v.loop(columns, v.lanes, [], vector)

        return kernel(lanes, body)

    def activate(function: Callable[[Vectors, Value], Value]) -> Any:
        return row(lambda v, value, at: function(v, value))

    kinds = [activate(ACTIVATIONS[name]) for name in ACTIVATION_NAMES]
    kinds.append(row(lambda v, value, at: value))
    kinds.append(row(lambda v, value, at: v.add(v.load(at), value)))
    return _choose(kinds)


def _choose(kinds: Sequence[Any]) -> Any:
    """A compiled function that calls the kernel of a number."""
    first = kinds[0]
    if len(kinds) == 1:

        @compiled
        def last(kind: int, sums: int, bias: int, out: int, columns: int) -> None:
            first(sums, bias, out, columns)

        return last
    others = _choose(kinds[1:])

    @compiled
    def choose(kind: int, sums: int, bias: int, out: int, columns: int) -> None:
        if kind == 0:
            first(sums, bias, out, columns)
        else:
            others(kind - 1, sums, bias, out, columns)

    return choose
