"""What goes wrong in step 11."""

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
_PROGRESS = "progress = (step - warmup_steps) / (steps - warmup_steps)"
_GET_NORM = "norm = math.sqrt(sum(float(np.square(array).sum()) for array in gradients.values()))"
_CLIP = """    if norm > max_norm:
        for name in gradients:
            gradients[name] *= max_norm / norm
"""
_COMMON = f"    {_GET_NORM}\n{_CLIP}"
_SUMMED = """            loss += one_loss / len(batch)
            for name, array in found.items():
                gradients[name] += array / len(batch)
"""
_COUNTER = (
    "The update counter is not 1 in the first update; it rises once an update, before the loop."
)

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
    Mistake(
        "clipped by array",
        "Each array is clipped by its own norm, which changes the direction of the whole. There "
        "is one norm, of all arrays together.",
        _CLIP,
        "    for array in gradients.values():\n"
        "        array *= min(1, max_norm / np.linalg.norm(array))\n",
    ),
    Mistake(
        "norm of each array",
        "Each array has its own norm. There is one norm, of all arrays together, and one factor.",
        _COMMON,
        """    for array in gradients.values():
        norm = float(np.linalg.norm(array))
        if norm > max_norm:
            array *= max_norm / norm
""",
    ),
    Mistake(
        "clipped by element",
        "Every element is clipped alone, which changes the direction. Scale all by one factor.",
        "gradients[name] *= max_norm / norm",
        "gradients[name] = np.clip(gradients[name], -max_norm, max_norm)",
    ),
    Mistake(
        "always scaled",
        "The gradients are scaled to the limit although they are below it.",
        "    if norm > max_norm:\n",
        "    if norm > 0:\n",
    ),
    Mistake(
        "clipping not in place",
        "The gradients in the dictionary are unchanged: array = array * factor makes a new array. "
        "Write gradients[name] *= factor.",
        "gradients[name] *= max_norm / norm",
        "array = gradients[name] * max_norm / norm",
    ),
    Mistake(
        "norms added",
        "The norms of the arrays are added. The norm of all is the root of the sum of squares.",
        _GET_NORM,
        "norm = float(sum(np.linalg.norm(array) for array in gradients.values()))",
    ),
    Mistake(
        "square of the sum",
        "np.sum(g) ** 2 is the square of the sum. The norm needs the sum of the squares: "
        "np.sum(g**2).",
        "np.square(array).sum()",
        "np.square(array.sum())",
    ),
    Mistake(
        "no warmup",
        "The first steps have the peak's learning rate: the warmup is missing.",
        "return peak * (step + 1) / (warmup_steps + 1)",
        "return peak",
    ),
    Mistake(
        "warmup from zero",
        "The first step has the learning rate 0, so it changes nothing. The rate is "
        "peak * (step + 1) / (warmup_steps + 1).",
        "return peak * (step + 1) / (warmup_steps + 1)",
        "return peak * step / warmup_steps",
    ),
    Mistake(
        "cosine from step 0",
        "The cosine begins at step 0; it begins behind the warmup.",
        _PROGRESS,
        "progress = step / steps",
    ),
    Mistake(
        "cosine to zero",
        "The cosine ends at 0; it ends at the floor.",
        "return floor + (peak - floor) *",
        "return peak *",
    ),
    Mistake(
        "cosine rises again",
        "Behind the last step the cosine rises again; the floor stays.",
        "    if step >= steps:\n        return floor\n",
        "",
    ),
    Mistake(
        "no bias correction",
        "The moments are not divided by 1 - beta^update. They begin at 0, so the first ones are "
        "far too small.",
        "corrected = m / (1 - self.beta1**self.updates)\n"
        "            root = np.sqrt(v / (1 - self.beta2**self.updates))",
        "corrected, root = m, np.sqrt(v)",
    ),
    Mistake(
        "correction of the first update only",
        "The correction does not change from update to update: beta is raised to the number of "
        "the update.",
        "self.updates += 1",
        "self.updates = 1",
    ),
    Mistake(
        "updates counted in the loop",
        _COUNTER,
        """        self.updates += 1
        for name, g in gradients.items():
""",
        """        for name, g in gradients.items():
            self.updates += 1
""",
    ),
    Mistake(
        "first update has number 2",
        _COUNTER,
        "        self.updates = 0\n",
        "        self.updates = 1\n",
    ),
    Mistake(
        "updates counted from 0",
        "The first update is number 1. With 0, 1 - beta^0 is 0, and 0 / 0 is NaN.",
        "        self.updates = 0\n",
        "        self.updates = -1\n",
    ),
    Mistake(
        "no root of the second moment",
        "The step is divided by v^; divide by its square root.",
        "root = np.sqrt(v / (1 - self.beta2**self.updates))",
        "root = v / (1 - self.beta2**self.updates)",
    ),
    Mistake(
        "update not in place",
        "The parameters do not change: `parameter = parameter - ...` makes a new array. Write "
        "parameter -= ...; the model has the same arrays.",
        "parameter -= learning_rate * corrected",
        "parameter = parameter - learning_rate * corrected",
    ),
    Mistake(
        "decay on biases",
        "Biases and gains are decayed too. Decay is for matrices: arrays of two axes.",
        'if parameter.ndim == 2 and name != "position_embedding":',
        'if name != "position_embedding":',
    ),
    Mistake(
        "decay of positions",
        "The position embedding is decayed. It has two axes, but is no matrix of a linear layer.",
        ' and name != "position_embedding":',
        ":",
    ),
    Mistake(
        "token embedding not decayed",
        "token_embedding is decayed too: its name does not end in weight, but it has two axes.",
        'parameter.ndim == 2 and name != "position_embedding":',
        'name.endswith("weight"):',
    ),
    Mistake(
        "decay in the gradient",
        "weight_decay * p is added to the gradient, so it is divided by the root too: that is "
        "Adam with L2 regularization. AdamW takes the decay off the parameter itself.",
        "            m += (1 - self.beta1) * (g - m)",
        "            if parameter.ndim == 2 and name != 'position_embedding':\n"
        "                g = g + self.weight_decay * parameter\n"
        "                parameter /= 1 - learning_rate * self.weight_decay\n"
        "            m += (1 - self.beta1) * (g - m)",
    ),
    Mistake(
        "no decay",
        "There is no weight decay.",
        "parameter *= 1 - learning_rate * self.weight_decay",
        "pass",
    ),
    Mistake(
        "targets not shifted",
        "The targets are the inputs themselves, so the model learns to repeat each token. The "
        "target of a token is the next one: start + 1 to start + context + 1.",
        "targets = tokens[start + 1 : start + context + 1]",
        "targets = tokens[start : start + context]",
    ),
    Mistake(
        "one target too few",
        "A sequence of `context` tokens has `context` targets; the last one lies behind it.",
        "            inputs = tokens[start : start + context]\n"
        "            targets = tokens[start + 1 : start + context + 1]\n",
        "            inputs = tokens[start : start + context - 1]\n"
        "            targets = tokens[start + 1 : start + context]\n",
    ),
    Mistake(
        "loss and gradients of a step summed",
        "Loss and gradients of a step are summed over its sequences; take their means.",
        _SUMMED,
        _SUMMED.replace(" / len(batch)", ""),
    ),
    Mistake(
        "losses of a step summed",
        "The losses of a step's sequences are summed and not averaged: divide by len(batch).",
        "loss += one_loss / len(batch)",
        "loss += one_loss",
    ),
    Mistake(
        "gradients of a step summed",
        "The gradients are summed over the sequences and not averaged.",
        "gradients[name] += array / len(batch)",
        "gradients[name] += array",
    ),
    Mistake(
        "one update for each sequence",
        "The parameters are updated after each sequence. A step averages the gradients of its "
        "sequences and updates once.",
        """                gradients[name] += array / len(batch)
        clip_gradients(gradients, max_norm)
        optimizer.update(gradients, rate(step))
""",
        """                gradients[name] = array
            clip_gradients(gradients, max_norm)
            optimizer.update(gradients, rate(step))
""",
    ),
    Mistake(
        "last sequence only",
        "Only the gradients of the last sequence are used; add those of all.",
        "gradients[name] += array / len(batch)",
        "gradients[name] = array / len(batch)",
    ),
    Mistake(
        "last gradients not divided",
        "Only the last sequence's gradients are used; use the mean over all sequences.",
        "gradients[name] += array / len(batch)",
        "gradients[name] = array",
    ),
    Mistake(
        "loss and gradients of the last sequence",
        "Only the last sequence of a step counts; loss and gradients are means over all.",
        _SUMMED,
        _SUMMED.replace("+=", "=").replace(" / len(batch)", ""),
    ),
    Mistake(
        "gradients carried over",
        "The gradients of earlier steps are still in the sum: begin each step with zeros.",
        "        gradients = {name:",
        "        gradients = gradients if step else {name:",
    ),
    Mistake(
        "not clipped",
        "The gradients are not clipped before the update.",
        "        clip_gradients(gradients, max_norm)\n",
        "",
    ),
    Mistake(
        "constant learning rate",
        "Every step has the learning rate of step 0; ask for that of the step.",
        "rate(step)",
        "rate(0)",
    ),
    Mistake(
        "learning rate of the next step",
        "The learning rate is that of the next step. `rate` counts from 0, as `step` does.",
        "rate(step)",
        "rate(step + 1)",
    ),
)
