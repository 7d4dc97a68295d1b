"""The way forward and back through a model, and the gradient of one token's logits."""

import numpy as np

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step02_logits.solution import softmax
from nanovllm.learn.steps.step11_backward.solution import cross_entropy_backward

_LOGITS, _TARGET = np.array([[0, np.log(3), 0, 0]]), np.array([1])
_STAGES = ("embedding", "block 1", "block 2", "final norm", "head", "loss")
_SAVED = ("token ids", "rows, Q, K, V", "rows, Q, K, V", "rows", "rows", "P")
_LEFT, _STEP, _WIDTH, _TOP = 20, 122, 96, 84
_BASE, _SCALE = 330, 90  # y of zero, and height of a probability of 1


def draw() -> str:
    """Return the picture."""
    parts = [text(_LEFT, 58, "forward: compute, and save what the way back needs", "note")]
    for at, (stage, saved) in enumerate(zip(_STAGES, _SAVED, strict=True)):
        parts += _stage(_LEFT + at * _STEP, stage, saved, is_last=at == len(_STAGES) - 1)
    parts.append(text(_LEFT, 212, "backward: gradients, from the loss to the embedding", "note"))
    chance = softmax(_LOGITS)[0]
    grad = cross_entropy_backward(_LOGITS, _TARGET)[0]
    onehot = np.eye(4)[_TARGET[0]]
    parts += _bars(20, "P, the softmax", chance)
    parts += [text(238, _BASE - 30, "\u2212", "title", "middle")]
    parts += _bars(268, "the target, token 1", onehot)
    parts += [text(486, _BASE - 30, "=", "title", "middle")]
    parts += _bars(516, "gradient of the logits", grad)
    return picture("Forwards and backwards through a model", 760, 412, parts)


def _stage(x: float, stage: str, saved: str, *, is_last: bool) -> list[str]:
    middle = x + _WIDTH / 2
    parts = [
        _box(x, _TOP - 14, "bar ours", stage),
        _dashes(middle, _TOP + 22),
        text(middle, _TOP + 48, saved, "note", "middle"),
        _dashes(middle, _TOP + 54),
        _box(x, _TOP + 66, "bar", f"d {stage}"),
    ]
    if not is_last:
        right = x + (_WIDTH + _STEP) / 2
        parts += [
            text(right, _TOP + 8, "\u2192", "strong", "middle"),
            text(right, _TOP + 88, "\u2190", "strong", "middle"),
        ]
    return parts


def _box(x: float, y: float, kind: str, label: str) -> str:
    shape = f'x="{x}" y="{y}" width="{_WIDTH}" height="34" rx="5" opacity="0.3"'
    return f'<rect class="{kind}" {shape}/>\n' + text(
        x + _WIDTH / 2, y + 22, label, "strong", "middle"
    )


def _dashes(x: float, y: float) -> str:
    return f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y + 12}" stroke-dasharray="3 3"/>'


def _bars(x: float, title: str, values: np.ndarray) -> list[str]:
    parts = [text(x, 240, title, "strong")]
    for at, value in enumerate(values.tolist()):
        left, height = x + at * 48, round(abs(value) * _SCALE * 0.8, 1)
        top = _BASE - height if value > 0 else _BASE
        kind = "bar ours" if value > 0 else "bar"
        parts += [
            f'<rect class="{kind}" x="{left}" y="{top:g}" width="36" height="{height:g}"/>',
            text(left + 18, _BASE + 62, f"{value:.3g}", "value", "middle"),
        ]
    line = f'<line x1="{x}" y1="{_BASE}" x2="{x + 180}" y2="{_BASE}"/>'
    return [*parts, line]
