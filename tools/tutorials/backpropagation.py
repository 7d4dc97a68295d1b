"""The example of docs/tutorials/backpropagation-by-hand.md: one block, forward and backward.

    a = attention(norm(x))      h = x + a
    f = relu(norm(h) up) down   y = h + f
    loss = mean over tokens of -log softmax(y)[target]

Two tokens, three channels, one head of one dimension, and a vocabulary of three tokens whose logits
are y itself. Gains are 1 and biases are 0, as at the start of a training run.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from nanovllm.cli.svg import picture, text
from tools.tutorials.drawing import STYLE, arrow, box
from tools.tutorials.pages import Tutorial, code, table

Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Arrays: TypeAlias = dict[str, Array]

PAGE = "backpropagation-by-hand.md"
TARGETS = (2, 1)
WEIGHTS: Arrays = {
    "x": np.array([[1.0, 0.0, 2.0], [0.0, 2.0, 1.0]]),
    "query": np.array([[0.5], [0.0], [-0.5]]),
    "key": np.array([[0.0], [0.5], [-0.5]]),
    "value": np.array([[1.0], [-1.0], [1.0]]),
    "out": np.array([[0.5, 0.0, -0.5]]),
    "up": np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]),
    "down": np.array([[0.5, 0.0, 0.5], [0.0, 0.5, -0.5]]),
}
NAMES = {
    "x": "x",
    "n": "n = norm(x)",
    "q": "q = n query",
    "k": "k = n key",
    "v": "v = n value",
    "s": "s = q k^T",
    "p": "P = softmax(s)",
    "o": "o = P v",
    "a": "a = o out",
    "h": "h = x + a",
    "m": "m = norm(h)",
    "u": "u = m up",
    "f": "f = relu(u) down",
    "y": "y = h + f",
}
"""The intermediates in order, each with its formula."""
_PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"))
_STEP = 1e-5


def forward(weights: Mapping[str, Array], nudges: Mapping[str, Array] | None = None) -> Arrays:
    """Return every intermediate and the loss; `nudges` are added to those that they name."""
    seen: Arrays = {}

    def put(name: str, array: Array) -> Array:
        seen[name] = array if nudges is None or name not in nudges else array + nudges[name]
        return seen[name]

    x = weights["x"]
    n = put("n", _norm(x))
    q, k = put("q", n @ weights["query"]), put("k", n @ weights["key"])
    v = put("v", n @ weights["value"])
    s = put("s", q @ k.T)  # the root of one dimension is 1
    p = put("p", _softmax(np.where(np.tri(len(x)) == 1, s, -np.inf)))
    a = put("a", put("o", p @ v) @ weights["out"])
    h = put("h", x + a)
    u = put("u", put("m", _norm(h)) @ weights["up"])
    y = put("y", h + put("f", np.maximum(u, 0.0) @ weights["down"]))
    put("probabilities", _softmax(y))
    put("loss", -np.log(seen["probabilities"][np.arange(len(x)), TARGETS]).mean())
    return seen


def backward(weights: Mapping[str, Array], seen: Mapping[str, Array]) -> Arrays:
    """Return the gradient of the loss for every intermediate and weight, by the page's formulas."""
    x, grads = weights["x"], dict[str, Array]()
    grads["y"] = (seen["probabilities"] - np.eye(3)[list(TARGETS)]) / len(x)
    grads["f"] = grads["y"]
    relu = np.maximum(seen["u"], 0.0)
    grads["down"] = relu.T @ grads["f"]
    grads["u"] = (grads["f"] @ weights["down"].T) * (seen["u"] > 0)
    grads["up"] = seen["m"].T @ grads["u"]
    grads["m"] = grads["u"] @ weights["up"].T
    grads["h"] = grads["y"] + norm_backward(grads["m"], seen["h"])
    grads["a"] = grads["h"]
    grads["out"] = seen["o"].T @ grads["a"]
    grads["o"] = grads["a"] @ weights["out"].T
    grads["v"] = seen["p"].T @ grads["o"]
    grads["p"] = grads["o"] @ seen["v"].T
    row_means = (seen["p"] * grads["p"]).sum(axis=1, keepdims=True)  # D
    grads["s"] = seen["p"] * (grads["p"] - row_means)
    grads["q"], grads["k"] = grads["s"] @ seen["k"], grads["s"].T @ seen["q"]
    for name, rows in _PROJECTIONS:
        grads[name] = seen["n"].T @ grads[rows]
    products = [grads[rows] @ weights[name].T for name, rows in _PROJECTIONS]
    grads["n"] = products[0] + products[1] + products[2]
    grads["x"] = grads["h"] + norm_backward(grads["n"], x)
    return grads


def norm_backward(grad: Array, x: Array) -> Array:
    """Return the gradient of a layer norm's input: (g - mean(g) - n mean(g n)) / deviation."""
    n, deviation = _norm(x), x.std(axis=1, keepdims=True)
    mean, slope = grad.mean(axis=1, keepdims=True), (grad * n).mean(axis=1, keepdims=True)
    return (grad - mean - n * slope) / deviation


def central_differences(name: str) -> Array:
    """Return the gradient of an intermediate or weight from pairs of losses."""
    seen = forward(WEIGHTS)
    shape = (WEIGHTS | seen)[name].shape
    grad = np.zeros(shape)
    for index in np.ndindex(shape):
        nudge = np.zeros(shape)
        nudge[index] = _STEP
        if name in WEIGHTS:
            changed = ({**WEIGHTS, name: WEIGHTS[name] + sign * nudge} for sign in (1, -1))
            losses = tuple(forward(weights)["loss"] for weights in changed)
        else:
            losses = tuple(forward(WEIGHTS, {name: sign * nudge})["loss"] for sign in (1, -1))
        grad[index] = (losses[0] - losses[1]) / (2 * _STEP)
    return grad


def _norm(x: Array) -> Array:
    return (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)


def _softmax(scores: Array) -> Array:
    exps = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def tutorial() -> Tutorial:
    """Return the contents of the page."""
    seen = forward(WEIGHTS)
    grads = backward(WEIGHTS, seen)
    p, dp, ds = seen["p"][1], grads["p"][1], grads["s"][1]
    g, row_mean = grads["n"][0], float(p @ dp)
    means = (g.mean(), (g * seen["n"][0]).mean())
    through = norm_backward(grads["n"], WEIGHTS["x"])[0]
    names = [*NAMES, *(name for name in WEIGHTS if name != "x")]
    error = max(float(abs(grads[name] - central_differences(name)).max()) for name in names)
    assert error < 1e-9, error
    parts = {
        "weights": code([f"{name:6s} {_rows(array)}" for name, array in WEIGHTS.items()]),
        "forward": _stations(seen | {"x": WEIGHTS["x"]}),
        "loss": code(
            [
                f"P (softmax of y)  {_rows(seen['probabilities'])}",
                f"onehot(target)    {_rows(np.eye(3)[list(TARGETS)])}",
                f"dy                {_rows(grads['y'])}",
            ]
        ),
        "linear": code(
            [
                f"relu(u)^T, transposed rows  {_rows(np.maximum(seen['u'], 0).T)}",
                f"df                          {_rows(grads['f'])}",
                f"ddown = relu(u)^T df        {_rows(grads['down'])}",
            ]
        ),
        "norm": code(
            [
                f"dn                      {_row(g)}",
                f"n                       {_row(seen['n'][0])}",
                f"mean(dn)                {means[0]: .3f}",
                f"mean(dn n)              {means[1]: .3f}",
                f"deviation of x          {WEIGHTS['x'][0].std(): .3f}",
                f"dn - mean - n mean      {_row(through * WEIGHTS['x'][0].std())}",
                f"divided by deviation    {_row(through)}",
            ]
        ),
        "attention": code(
            [
                f"P                {_row(p)}",
                f"dP = do v^T      {_row(dp)}",
                f"D = sum(P dP)    {_product_sum(p, dp)} = {row_mean:.3f}",
                f"dP - D           {_row(dp - row_mean)}",
                f"ds = P (dP - D)  {_row(ds)}",
            ]
        ),
        "backward": _stations(grads),
        "gradients": code([f"d{name:6s} {_rows(grads[name])}" for name in WEIGHTS if name != "x"]),
    }
    facts = (
        f"loss is {seen['loss']:.3f}",
        "probabilities {:.3f} and {:.3f}".format(
            *seen["probabilities"][np.arange(len(TARGETS)), TARGETS]
        ),
        _product_sum(seen["u"][:, 0], grads["f"][:, 0]),
        f"{_STEP:.5f}",
    )
    return Tutorial(PAGE, parts, facts, {"backpropagation.svg": draw(seen, grads)})


def _row(row: Array) -> str:
    return "[" + " ".join(f"{value + 0.0:6.3f}".replace("-0.000", " 0.000") for value in row) + "]"


def _product_sum(a: Array, b: Array) -> str:
    return " + ".join(f"{x:.3f} * {y:.3f}" for x, y in zip(a, b, strict=True))


def _rows(array: Array) -> str:
    return "  ".join(_row(row) for row in array)


def _stations(arrays: Mapping[str, Array]) -> str:
    """Return a table of the intermediates, a row each."""
    rows = [[f"`{NAMES[name]}`", *(f"`{_row(row)}`" for row in arrays[name])] for name in NAMES]
    return table(["", "first token", "second token"], rows)


def draw(seen: Arrays, grads: Arrays) -> str:
    """Return the block as a picture, with values and gradients of the second token."""
    places = {
        "x": (90, 60), "n": (300, 60), "q": (210, 136), "k": (310, 136), "v": (410, 136),
        "p": (260, 212), "o": (410, 212), "a": (410, 288), "h": (90, 288),
        "m": (300, 364), "u": (300, 440), "f": (300, 516), "y": (90, 516),
    }  # fmt: skip
    flows = ("xn", "nq", "nk", "nv", "qp", "kp", "po", "vo", "oa", "ah", "xh", "hm", "mu", "uf")
    parts = [_flow(places[flow[0]], places[flow[1]]) for flow in (*flows, "fy", "hy")]
    labels = {"p": "P", "n": "norm", "m": "norm", "u": "up, ReLU", "a": "out", "f": "down"}
    for name, (x, y) in places.items():
        rows = {**seen, "x": WEIGHTS["x"]}[name], grads[name]
        parts.append(box(x - 42, y, 84, 24, labels.get(name, name)))
        for line, (row, kind) in enumerate(zip(rows, ("forward", "backward"), strict=True)):
            label = "  ".join(f"{value + 0.0:.3f}" for value in row[1])
            parts.append(text(x, y + 37 + 12 * line, label, f"small {kind}", "middle"))
    parts.append(text(16, 600, "blue: value on the way forward", "forward"))
    parts.append(text(250, 600, "orange: gradient on the way back (loss per unit)", "backward"))
    title = "One block and one token: values and gradients"
    return picture(title, 560, 616, parts, STYLE)


def _flow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x0, y0), (x1, y1) = start, end
    if y0 == y1:  # sideways
        side = 42 if x1 > x0 else -42
        return arrow((x0 + side, y0 + 12), (x1 - side, y1 + 12))
    return arrow((x0, y0 + 52), (x0, y1 - 10), (x1, y1 - 10), (x1, y1))
