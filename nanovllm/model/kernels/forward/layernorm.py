"""Layer normalization of one row, in three passes over a row that stays in the first-level cache.

Rows are padded with zeros to whole vectors. Padding adds nothing to the mean. A mask leaves it out
of the variance, where it would count as -mean. Gain and bias are 0 there, and so is the result.
"""

from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


@kernel_maker()
def make_normalize_row(
    v: Vectors, hidden_ptr: Value, gain_ptr: Value, bias_ptr: Value, out_ptr: Value,
    d_model: Value, epsilon_ptr: Value,
) -> None:  # fmt: skip
    """Return normalize_row(hidden_ptr, gain_ptr, bias_ptr, out_ptr, d_model, epsilon_ptr).

    hidden_ptr, out_ptr  float32 [d_model], in whole vectors
    gain_ptr, bias_ptr   float32 [d_model], in whole vectors
    d_model              length of the row
    epsilon_ptr          one float32
    """

    def centred(i: Value) -> Value:
        return v.load(v.element(hidden_ptr, i)) - mean

    def add(i: Value, total: Value) -> Value:
        return total + v.load(v.element(hidden_ptr, i))

    def add_square(i: Value, total: Value) -> Value:
        difference = v.where(v.first_lanes(d_model - i), centred(i), 0.0)
        return v.fma(difference, difference, total)

    zero = v.constant(0.0)
    count = d_model.to_float()
    mean = v.splat(v.sum(v.fold(d_model, v.lanes, zero, add)) / count)
    variance = v.sum(v.fold(d_model, v.lanes, zero, add_square)) / count
    deviation = v.sqrt(variance + v.load_scalar(epsilon_ptr))
    inverse = v.splat(1.0 / deviation)
    with v.range(d_model, v.lanes) as i:
        scaled = centred(i) * inverse
        gain, bias = v.load(v.element(gain_ptr, i)), v.load(v.element(bias_ptr, i))
        v.store(v.fma(scaled, gain, bias), v.element(out_ptr, i))
