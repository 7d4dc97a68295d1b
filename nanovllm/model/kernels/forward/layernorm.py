"""Layer or RMS normalization of a row that stays in the first-level cache, in three passes.

Rows are padded with zeros to whole vectors. Padding adds nothing to the mean. A mask leaves it out
of the variance, where it would count as -mean. Gain and bias are 0 there, and so is the result. An
RMS norm is a layer norm whose mean counts as 0 and whose bias is 0.
"""

from nanovllm.model.kernels.simd.elements import map_elements, sum_elements
from nanovllm.model.kernels.simd.kernel import kernel_maker
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


@kernel_maker()
def make_normalize_row(
    v: Vectors, hidden_ptr: Value, gain_ptr: Value, bias_ptr: Value, out_ptr: Value,
    d_model: Value, epsilon_ptr: Value, is_rms: Value,
) -> None:  # fmt: skip
    """Return normalize_row(hidden_ptr, gain_ptr, bias_ptr, out_ptr, d_model, epsilon_ptr, is_rms).

    hidden_ptr, out_ptr  float32 [d_model], in whole vectors
    gain_ptr, bias_ptr   float32 [d_model], in whole vectors
    d_model              length of the row
    epsilon_ptr          one float32
    is_rms               1 for an RMS norm, else 0
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
    mean = v.where(is_rms == 1, zero, mean)
    variance = v.sum(v.fold(d_model, v.lanes, zero, add_square)) / count
    deviation = v.sqrt(variance + v.load_scalar(epsilon_ptr))
    inverse = v.splat(1.0 / deviation)
    with v.range(d_model, v.lanes) as i:
        scaled = centred(i) * inverse
        gain, bias = v.load(v.element(gain_ptr, i)), v.load(v.element(bias_ptr, i))
        v.store(v.fma(scaled, gain, bias), v.element(out_ptr, i))


@kernel_maker()
def make_normalize_head(
    v: Vectors, head_ptr: Value, gain_ptr: Value, head_dim: Value, epsilon_ptr: Value
) -> None:
    """Return normalize_head(head_ptr, gain_ptr, head_dim, epsilon_ptr): an RMS norm, in place.

    head_ptr, gain_ptr  float32 [head_dim]
    epsilon_ptr         one float32
    """
    (squares,) = sum_elements(v, head_dim, [head_ptr], 1, lambda x: [x * x])
    deviation = v.sqrt(squares / head_dim.to_float() + v.load_scalar(epsilon_ptr))
    inverse = v.splat(1.0 / deviation)
    map_elements(
        v, head_dim, [head_ptr, gain_ptr], [head_ptr], lambda x, gain: [x * inverse * gain]
    )
