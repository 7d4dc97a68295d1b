"""`nanovllm trace`: print the forward pass of a prompt step by step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanovllm.cli.argument_types import positive
from nanovllm.cli.environment import MODEL_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import add_model_flag
from nanovllm.cli.parser import set_up
from nanovllm.errors import counted

if TYPE_CHECKING:
    from nanovllm.inspection.attention import HeadStatistics
    from nanovllm.inspection.observe import InspectedModel
    from nanovllm.inspection.trace import TraceStep

_COLUMNS = 100
_MAX_SHOWN_TOKEN = 20  # characters
_MIN_WEIGHT = 0.3  # heads below it are not named
_HEADER = f"{'operation':38} {'shape':>14} {'mean':>8} {'std':>8} {'min':>8} {'max':>8} {'norm':>8}"
_KINDS = {
    "previous_token": "previous token",
    "first_token": "first token",
    "self": "itself",
    "induction": "induction",
}
_DESCRIPTION = """
Print the forward pass of a prompt step by step: each operation with the shape, mean, standard
deviation, smallest and largest number of its result, and the mean norm of its rows; the heads with
the largest weights of a kind; and the most probable next tokens after each layer (logit lens).

  nanovllm trace "The old man said to the"
  nanovllm trace --model gpt2 "The capital of France is" --json
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "PROMPT [--model MODEL] [options]", _DESCRIPTION, MODEL_VARIABLES)
    parser.add_argument("prompt", metavar="PROMPT", help="text of at most 512 tokens")
    add_model_flag(parser)
    parser.add_argument(
        "--top", type=positive, default=4, metavar="N", help="tokens of each prediction, at most 20"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: no)")


def run(parsed: argparse.Namespace) -> int:
    """Print the trace of a prompt as text or JSON."""
    with ended_by_interrupts():
        from nanovllm.hub import resolve_model
        from nanovllm.inspection.logit_lens import check_top
        from nanovllm.inspection.observe import InspectedModel
        from nanovllm.inspection.trace import trace
    check_top(parsed.top)
    model = InspectedModel.load(resolve_model(parsed.model))
    token_ids = model.encode(parsed.prompt)
    steps = trace(model, token_ids, parsed.top)
    if parsed.json:
        print(json.dumps(_record(model, token_ids, steps), allow_nan=False))
    else:
        for line in _report(model, token_ids, steps):
            print(line)
    return 0


def _report(
    model: InspectedModel, token_ids: Sequence[int], steps: Sequence[TraceStep]
) -> Iterator[str]:
    """Yield the lines of the text."""
    config = model.config
    yield (
        f"{model.name}: {counted(config.layers, 'layer')}, {counted(config.heads, 'head')}, "
        f"d_model {config.d_model}, vocabulary {config.vocab:,}"
    )
    yield from _wrap("prompt", [_quoted(model, token_id) for token_id in token_ids], len(token_ids))
    yield ""
    yield _HEADER
    layer: int | None = None
    for step in steps:
        if step.layer != layer:
            layer = step.layer
            yield "" if layer is None else f"\nlayer {layer}"
        numbers = (step.mean, step.std, step.min, step.max, step.norm)
        indent = "" if step.layer is None else "  "
        yield (
            f"{indent + step.operation:38} {list(step.shape)!s:>14} "
            + " ".join(f"{_number(value):>8}" for value in numbers)
        )
        if step.heads:
            yield _heads(step.heads)
        if step.prediction is not None:
            name = "prediction" if step.name == "logits" else "lens"
            yield _prediction(model, step.prediction, name)
    yield "\nnorm: mean Euclidean norm of the rows. lens: prediction after the prompt, read at this"
    yield "point of the residual stream. Heads are named if their mean weight is at least 0.3."


def _wrap(name: str, texts: Sequence[str], count: int) -> Iterator[str]:
    """Yield texts in lines of at most _COLUMNS, after a name and a count."""
    line = f"{name}: {counted(count, 'token')} "
    for text in texts:
        if len(line) + len(text) + 1 > _COLUMNS:
            yield line.rstrip()
            line = "  "
        line += f"{text} "
    yield line.rstrip()


def _heads(heads: Sequence[HeadStatistics]) -> str:
    """Return the heads with the largest weight of each kind, and the range of entropies."""
    if heads[0].entropy is None:
        return "    the only token attends to itself"
    entropies = [head.entropy for head in heads if head.entropy is not None]
    parts = [f"entropy {min(entropies):.2f} to {max(entropies):.2f} nats"]
    for kind, name in _KINDS.items():
        weights = [getattr(head, kind) or 0.0 for head in heads]
        best = max(range(len(heads)), key=weights.__getitem__)
        if weights[best] >= _MIN_WEIGHT:
            parts.append(f"{name}: head {heads[best].head} ({weights[best]:.2f})")
    return "    " + "; ".join(parts)


def _prediction(model: InspectedModel, prediction: dict[str, Any], name: str) -> str:
    """Return the most probable tokens, as many as fit a line."""
    line = f"    {name:10} "
    for token in prediction["top"]:
        part = f"{_quoted(model, token['id'])} {100 * token['p']:.1f}%  "
        if len(line) + len(part) - 2 > _COLUMNS:
            break
        line += part
    return line.rstrip()


def _quoted(model: InspectedModel, token_id: int) -> str:
    """Return a token's text in quotes; control characters are escaped, long texts are cut."""
    text = json.dumps(model.tokenizer.token_text(token_id), ensure_ascii=False)[1:-1]
    shown = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)
    cut = shown if len(shown) <= _MAX_SHOWN_TOKEN else f"{shown[: _MAX_SHOWN_TOKEN - 1]}…"
    return f'"{cut}"'


def _number(value: float) -> str:
    """Return a number in at most 8 characters."""
    size = abs(value)
    if value != 0 and (size >= 1e5 or size < 1e-3):
        return f"{value:.1e}"
    return f"{value:.{3 if size < 100 else 1}f}"


def _record(
    model: InspectedModel, token_ids: Sequence[int], steps: Sequence[TraceStep]
) -> dict[str, Any]:
    """Return the trace as a JSON object."""
    config = model.config
    return {
        "model": model.name,
        "layers": config.layers,
        "heads": config.heads,
        "d_model": config.d_model,
        "vocab": config.vocab,
        "tokens": [*map(model.token, token_ids)],
        "steps": [asdict(step) for step in steps],
    }
