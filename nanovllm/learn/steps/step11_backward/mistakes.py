"""What goes wrong in the gradients of step 11."""

from nanovllm.learn.checking import Mistake

_LINEAR = "return grad @ weight.T, rows.T @ grad, grad.sum(axis=0)"
_NORM = "return (scaled - mean - normal * along) / root, (grad * normal).sum(axis=0)"
_ROW = """    centred = hidden - hidden.mean(axis=1, keepdims=True)
    root = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + epsilon)
    normal = centred / root
    scaled = grad * gain
"""
_MEANS = """    mean = scaled.mean(axis=1, keepdims=True)
    along = (scaled * normal).mean(axis=1, keepdims=True)
"""
_SCORES = "grad_scores = weights * (grad_weights - dots) / math.sqrt(queries.shape[2])"
_DOTS = "dots = (weights * grad_weights).sum(axis=2, keepdims=True)"

MISTAKES = (
    Mistake(
        "weight gradient transposed",
        "The gradient of the weight is transposed. It is rows^T @ grad, [d_in, d_out].",
        _LINEAR,
        _LINEAR.replace("rows.T @ grad", "grad.T @ rows"),
    ),
    Mistake(
        "weight not transposed",
        "The gradient of the rows is grad @ weight^T: grad has d_out columns, rows have d_in.",
        _LINEAR,
        _LINEAR.replace("weight.T", "weight"),
    ),
    Mistake(
        "bias gradient not summed",
        "The gradient of the bias is not summed over the rows. Every row adds the same bias, so "
        "every row's gradient counts.",
        _LINEAR,
        _LINEAR.replace(".sum(axis=0)", ""),
    ),
    Mistake(
        "bias gradient averaged",
        "The gradient of the bias is the mean over the rows; it is the sum. The loss has divided "
        "by the number of tokens already.",
        _LINEAR,
        _LINEAR.replace(".sum(", ".mean("),
    ),
    Mistake(
        "bias gradient over the outputs",
        "The gradient of the bias is summed over the outputs (axis 1). Sum it over the rows, "
        "axis 0: one number for each output.",
        _LINEAR,
        _LINEAR.replace("axis=0", "axis=1"),
    ),
    Mistake(
        "loss summed",
        "The gradient is that of the sum over the tokens. The loss is their mean: divide by the "
        "number of tokens.",
        "return grad / len(targets)",
        "return grad",
    ),
    Mistake(
        "divided by all elements",
        "The gradient is divided by tokens * vocab. The mean is over the tokens.",
        "return grad / len(targets)",
        "return grad / grad.size",
    ),
    Mistake(
        "target not subtracted",
        "The one at the target is not subtracted: the gradient is P - onehot. Its rows sum to 0.",
        "    grad[np.arange(len(targets)), targets] -= 1\n",
        "",
    ),
    Mistake(
        "sign",
        "The sign is wrong: onehot - P is the gradient of the log-probability, and the loss is "
        "its negative. Updates would make the loss larger.",
        "return grad / len(targets)",
        "return -grad / len(targets)",
    ),
    Mistake(
        "one column for all rows",
        "grad[:, targets] takes whole columns. One element in each row is "
        "grad[np.arange(tokens), targets].",
        "grad[np.arange(len(targets)), targets]",
        "grad[:, targets]",
    ),
    Mistake(
        "maximum not subtracted",
        "The largest logit is not subtracted before np.exp, which overflows: inf / inf is NaN. The "
        "softmax of step 2 does it.",
        "grad = softmax(logits)",
        "grad = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)",
    ),
    Mistake(
        "mean term missing",
        "mean(g) is not subtracted: the gradient through the row's mean is missing. Each row of "
        "the gradient must sum to 0.",
        "(scaled - mean - normal * along)",
        "(scaled - normal * along)",
    ),
    Mistake(
        "variance term missing",
        "n * mean(g * n) is not subtracted: the gradient through the row's variance is missing.",
        "(scaled - mean - normal * along)",
        "(scaled - mean)",
    ),
    Mistake(
        "both terms missing",
        "Mean and variance are treated as constants. They depend on every element of the row: "
        "subtract mean(g) and n * mean(g * n).",
        "(scaled - mean - normal * along)",
        "scaled",
    ),
    Mistake(
        "gain missing",
        "The upstream gradient is not multiplied by the gain: g = grad * gain.",
        "scaled = grad * gain",
        "scaled = grad",
    ),
    Mistake(
        "gain at the end",
        "The gain is applied behind the two means. It belongs before them: g = grad * gain.",
        "    scaled = grad * gain\n",
        "    scaled, root = grad, root / gain\n",
    ),
    Mistake(
        "wrong axis",
        "The means of g and g * n are taken over the tokens (axis 0); they are those of a row.",
        _MEANS,
        _MEANS.replace("axis=1", "axis=0"),
    ),
    Mistake(
        "gradient means of the whole array",
        "mean(g) and mean(g * n) are those of the whole array. Each row has its own: "
        "mean(axis=1, keepdims=True).",
        _MEANS,
        _MEANS.replace("axis=1, keepdims=True", ""),
    ),
    Mistake(
        "all means of the whole array",
        "All means are those of the whole array, also in n. Each row has its own: "
        "mean(axis=1, keepdims=True).",
        _ROW + _MEANS,
        (_ROW + _MEANS).replace("axis=1, keepdims=True", ""),
    ),
    Mistake(
        "normalized by the whole array",
        "The mean and the variance in n are those of the whole array. Each row has its own: "
        "mean(axis=1, keepdims=True).",
        _ROW,
        _ROW.replace("axis=1, keepdims=True", ""),
    ),
    Mistake(
        "means of rows without keepdims",
        "A mean over axis 1 has the shape [tokens] and does not fit to [tokens, d_model]; "
        "`keepdims=True` gives [tokens, 1].",
        _MEANS,
        _MEANS.replace(", keepdims=True", ""),
    ),
    Mistake(
        "epsilon missing",
        "The root is that of the variance alone; the forward pass adds epsilon to the variance.",
        "keepdims=True) + epsilon)",
        "keepdims=True))",
    ),
    Mistake(
        "root missing",
        "The gradient of the row is not divided by sqrt(variance + epsilon).",
        _NORM,
        _NORM.replace(" / root", ""),
    ),
    Mistake(
        "gain gradient of the input",
        "The gain multiplies the normalized row n, so its gradient is the sum of grad * n, not "
        "of grad * hidden.",
        _NORM,
        _NORM.replace("grad * normal", "grad * hidden"),
    ),
    Mistake(
        "gradients of gain and bias not summed",
        "Every row uses the same gain and bias: sum their gradients over the rows.",
        _NORM + ", grad.sum(axis=0)",
        _NORM.replace(".sum(axis=0)", "") + ", grad",
    ),
    Mistake(
        "no scale in the gradient",
        "The scores were divided by sqrt(head_dim), so the gradients of queries and keys are too.",
        _SCORES,
        "grad_scores = weights * (grad_weights - dots)",
    ),
    Mistake(
        "D missing",
        "D is not subtracted. The weights of a row sum to 1: where one grows, the others shrink.",
        _SCORES,
        _SCORES.replace("(grad_weights - dots)", "grad_weights"),
    ),
    Mistake(
        "D over the queries",
        "D is summed over the queries (axis 1). The softmax of a query runs over its keys: axis 2.",
        _DOTS,
        _DOTS.replace("axis=2", "axis=1"),
    ),
    Mistake(
        "D without the weights",
        "D is the sum of dP; it is the sum of P * dP, a mean of dP weighted by P.",
        _DOTS,
        _DOTS.replace("(weights * grad_weights)", "grad_weights"),
    ),
    Mistake(
        "axes of attention",
        "`.T` of three axes reverses all of them; use `.swapaxes(-1, -2)`. D keeps its axis: "
        "`keepdims=True`.",
        _DOTS,
        _DOTS.replace(", keepdims=True", ""),
    ),
    Mistake(
        "gradient of a sigmoid",
        "P * (1 - P) * dP is the gradient of a sigmoid, and the diagonal of the softmax's alone. "
        "Each weight depends on all scores of the row: P * (dP - D).",
        _SCORES,
        _SCORES.replace("(grad_weights - dots)", "(1 - weights) * grad_weights"),
    ),
    Mistake(
        "mask forgotten",
        "The weights are computed again without the causal mask. They must be those of the "
        "forward pass: call attention_weights.",
        "weights = attention_weights(queries, keys)",
        "scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(queries.shape[2])\n"
        "    weights = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)",
    ),
    Mistake(
        "weights not transposed",
        "The gradient of the values is P^T @ grad: a value gets the gradients of the queries that "
        "saw it.",
        "grad_values = weights.transpose(0, 2, 1) @ grad",
        "grad_values = weights @ grad",
    ),
    Mistake(
        "score gradient not transposed",
        "The gradient of the keys is dS^T @ queries: a key gets something from each query.",
        "grad_scores.transpose(0, 2, 1) @ queries",
        "grad_scores @ queries",
    ),
    Mistake(
        "queries and keys swapped",
        "The gradient of the queries is dS @ keys, that of the keys dS^T @ queries.",
        "return grad_scores @ keys, grad_scores.transpose(0, 2, 1) @ queries,",
        "return grad_scores.transpose(0, 2, 1) @ queries, grad_scores @ keys,",
    ),
)
