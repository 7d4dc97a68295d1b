"""Layer normalisation of one row, in three passes over a row that stays in the first-level cache.

Rows are padded with zeros to whole vectors. Padding adds nothing to the sum; in the variance, where it would count as -mean, a mask leaves
it out; gain and bias are zero there, and so is the result.
"""

from typing import Any

from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.vector import F32, Value, Vectors, kernel


def make_layer_norm(target: KernelTarget) -> Any:
    """layer_norm(hidden, gain, bias, out, d_model, epsilon): one row; `epsilon` is the address of a float32."""

    def layer_norm(
        v: Vectors,
        hidden: Value,
        gain: Value,
        bias: Value,
        out: Value,
        d_model: Value,
        epsilon: Value,
    ) -> None:
        def centred(i: Value) -> Value:
            return v.subtract(v.load(v.element(hidden, i)), mean)

        def add(i: Value, total: list[Value]) -> list[Value]:
            return [v.add(total[0], v.load(v.element(hidden, i)))]

        def add_square(i: Value, total: list[Value]) -> list[Value]:
            inside = v.first_lanes(v.builder.sub(d_model, i))
            difference = v.where(inside, centred(i), v.constant(0.0))
            return [v.fma(difference, difference, total[0])]

        def normalise(i: Value, _: list[Value]) -> list[Value]:
            scaled = v.multiply(centred(i), inverse)
            v.store(
                v.fma(scaled, v.load(v.element(gain, i)), v.load(v.element(bias, i))),
                v.element(out, i),
            )
            return []

        count = v.builder.sitofp(d_model, F32)
        mean = v.splat(v.divide(v.sum(v.loop(d_model, v.lanes, [v.constant(0.0)], add)[0]), count))
        variance = v.divide(
            v.sum(v.loop(d_model, v.lanes, [v.constant(0.0)], add_square)[0]), count
        )
        deviation = v.sqrt(v.add(variance, v.load_scalar(epsilon)))
        inverse = v.splat(v.divide(F32(1.0), deviation))
        v.loop(d_model, v.lanes, [], normalise)

    return kernel(target, layer_norm)
