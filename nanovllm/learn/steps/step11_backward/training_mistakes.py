"""What goes wrong in the training of step 11."""

from nanovllm.learn.checking import Mistake

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
        "norm without a root",
        "The sum of the squares is not the norm; its root is.",
        _GET_NORM,
        _GET_NORM.replace("math.sqrt(", "float("),
    ),
    Mistake(
        "norm after clipping",
        "The result is the norm after clipping; return the one before.",
        "    return norm\n",
        "    return min(norm, max_norm)\n",
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
        "decay without the learning rate",
        "The decay is not multiplied by the learning rate: p - learning_rate * weight_decay * p.",
        "parameter *= 1 - learning_rate * self.weight_decay",
        "parameter *= 1 - self.weight_decay",
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
        "loss of the last sequence",
        "The loss of a step is that of its last sequence; it is the mean over all.",
        "loss += one_loss / len(batch)",
        "loss = one_loss",
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
