"""Static pictures, .png and .svg, by matplotlib.

Text is drawn as text in SVG files. Characters without a glyph in matplotlib's font appear as boxes.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

from nanovllm.errors import InvalidRequestError, NanovllmError, counted
from nanovllm.inspection.attention import HeadStatistics
from nanovllm.inspection.embeddings import Projection
from nanovllm.inspection.observe import JSON, InspectedModel
from nanovllm.model.ablation import Part
from nanovllm.model.config import ModelConfig

MAX_LENS_TOKENS = 40
MAX_LABELLED_TOKENS = 128
_MAX_TOKEN_CHARACTERS = 16
_MAX_POINT_LABELS = 150
_COLORS = "viridis"
_DPI = 150


class MissingPackageError(NanovllmError):
    """A picture needs a package that is not installed."""


def check_packages() -> None:
    """Raise MissingPackageError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise MissingPackageError(
            "pictures need matplotlib, and t-SNE scikit-learn; pip install matplotlib "
            "scikit-learn, or write an .html file"
        )


def draw_attention(
    model: InspectedModel,
    token_ids: Sequence[int],
    weights: Float32[np.ndarray, "heads pairs"],
    heads: Sequence[HeadStatistics],
    path: Path,
) -> None:
    """Draw the weights of one head with its tokens, or of several heads as a grid.

    `heads` are all heads of some layers, or some of each of these layers, layer by layer.
    """
    count = len(token_ids)
    maps = np.full((len(heads), count, count), np.nan, dtype=np.float32)
    queries, keys = np.tril_indices(count)
    maps[:, queries, keys] = weights
    if len(heads) == 1:
        _draw_head(model, token_ids, maps[0], heads[0], path)
    else:
        _draw_grid(model, count, maps, heads, path)


def _draw_head(
    model: InspectedModel,
    token_ids: Sequence[int],
    weights: Float32[np.ndarray, "queries keys"],
    head: HeadStatistics,
    path: Path,
) -> None:
    count = len(token_ids)
    size = min(max(0.24 * count, 4.0), 20.0)
    figure, axes = _figure(size + 2.5, size + 1.5)
    image = axes.imshow(weights, cmap=_COLORS, vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(f"{model.name}: attention of layer {head.layer}, head {head.head}")
    axes.set_xlabel("key: token that is read")
    axes.set_ylabel("query: token that reads")
    if count <= MAX_LABELLED_TOKENS:
        labels = [_label(model, token_id) for token_id in token_ids]
        font_size = float(min(9.0, 72 * 0.8 * size / count))
        axes.set_xticks(range(count), labels, rotation=90, fontsize=font_size, family="monospace")
        axes.set_yticks(range(count), labels, fontsize=font_size, family="monospace")
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention weight (each row sums to 1)")
    _save(figure, path)


def _draw_grid(
    model: InspectedModel,
    count: int,
    maps: Float32[np.ndarray, "heads queries keys"],
    heads: Sequence[HeadStatistics],
    path: Path,
) -> None:
    layers = list(dict.fromkeys(head.layer for head in heads))
    columns = len(heads) // len(layers)
    side = min(max(16.0 / max(columns, len(layers)), 0.8), 2.2)
    figure, _ = _figure(side * columns + 1.8, side * len(layers) + 1.4, is_empty=True)
    grid = figure.subplots(len(layers), columns, squeeze=False, sharex=True, sharey=True)
    for head, weights, axes in zip(heads, maps, grid.flat, strict=True):
        # Weights of heads with many tokens are small: the colours follow their square root.
        image = axes.imshow(
            np.sqrt(weights), cmap=_COLORS, vmin=0.0, vmax=1.0, interpolation="nearest"
        )
        axes.tick_params(labelsize=6)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=3)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        if head.layer == layers[0]:
            axes.set_title(f"head {head.head}", fontsize=8)
    for axes, layer in zip(grid[:, 0], layers, strict=True):
        axes.set_ylabel(f"layer {layer}", fontsize=8)
    figure.suptitle(f"{model.name}: attention of {counted(count, 'token')}", fontsize=11)
    figure.supxlabel("position of the key (token that is read)", fontsize=9)
    figure.supylabel("position of the query (token that reads)", fontsize=9)
    bar = figure.colorbar(
        image, ax=grid.ravel().tolist(), shrink=0.6, aspect=40, ticks=[0.0, 0.5**0.5, 1.0]
    )
    bar.ax.set_yticklabels(["0", "0.5", "1"])
    bar.set_label("attention weight")
    _save(figure, path)


def draw_lens(model: InspectedModel, token_ids: Sequence[int], lens: JSON, path: Path) -> None:
    """Draw the most probable token of each layer at each position, coloured by its probability.

    Raises InvalidRequestError for more than MAX_LENS_TOKENS tokens.
    """
    count = len(token_ids)
    if count > MAX_LENS_TOKENS:
        raise InvalidRequestError(
            f"the prompt has {count} tokens, a picture shows up to {MAX_LENS_TOKENS}; shorten it, "
            "or write an .html file"
        )
    best = [[cell["top"][0] for cell in row] for row in lens["cells"]]
    probabilities = np.array([[token["p"] for token in row] for row in best])
    figure, axes = _figure(max(0.85 * count + 3.0, 6.0), max(0.34 * len(best) + 2.2, 4.2))
    image = axes.imshow(
        probabilities, cmap=_COLORS, vmin=0.0, vmax=1.0, aspect="auto", origin="lower"
    )
    for row, cells in enumerate(best):
        for position, token in enumerate(cells):
            color = "black" if probabilities[row, position] > 0.55 else "white"
            axes.text(
                position,
                row,
                _label(model, token["id"], 10),
                ha="center",
                va="center",
                color=color,
                fontsize=7,
                family="monospace",
                parse_math=False,
            )
    labels = [_label(model, token_id) for token_id in token_ids]
    axes.set_xticks(range(count), labels, rotation=60, ha="right", family="monospace", fontsize=8)
    axes.set_yticks(range(len(best)), lens["layers"], fontsize=8)
    axes.set_title(f"{model.name}: most probable next token after each layer (logit lens)")
    axes.set_xlabel("token of the prompt")
    axes.set_ylabel("residual stream")
    figure.colorbar(image, ax=axes, label="probability of this token")
    _save(figure, path)


def draw_embeddings(
    model: InspectedModel, projection: Projection, marked: Sequence[int], path: Path
) -> None:
    """Draw the tokens in the plane, the marked ones in another colour and all labelled."""
    figure, axes = _figure(11.0, 9.0)
    points = projection.points
    axes.scatter(points[:, 0], points[:, 1], s=6, alpha=0.35, linewidths=0, color="#4a44d4")
    explained = projection.explained
    if explained is None:
        name = "t-SNE"
        axes.set_xlabel("dimension 1 (no unit)")
        axes.set_ylabel("dimension 2 (no unit)")
    else:
        name = "PCA"
        axes.set_xlabel(f"component 1 ({100 * explained[0]:.1f}% of the variance)")
        axes.set_ylabel(f"component 2 ({100 * explained[1]:.1f}% of the variance)")
    axes.set_title(f"{model.name}: embeddings of {len(points):,} tokens, {name}")
    rows = {token_id: index for index, token_id in enumerate(projection.token_ids)}
    for token_id in dict.fromkeys(marked):
        x, y = points[rows[token_id]]
        axes.scatter([x], [y], s=28, color="#c8501e", zorder=3)
    labels = [_label(model, token_id) for token_id in projection.token_ids]
    is_text = [label.isascii() or label.lstrip("␣").isalpha() for label in labels]
    for index in _spread(points, [rows[token_id] for token_id in dict.fromkeys(marked)], is_text):
        token_id = projection.token_ids[index]
        axes.annotate(
            labels[index],
            points[index],
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=7 if token_id not in marked else 9,
            family="monospace",
            color="#c8501e" if token_id in marked else "#1a1a22",
            parse_math=False,
        )
    _save(figure, path)


def draw_ablation(
    name: str, config: ModelConfig, changes: Mapping[Part, float], path: Path
) -> None:
    """Draw the change of the loss, in nats per token, without each part: layers by heads, and
    layers by sublayers and blocks, which have a scale of their own.
    """
    heads = [str(head) for head in range(config.heads)]
    others = {"attention": "attention", "ffn": "feed-forward", "block": "block"}
    kinds = {part.kind for part in changes}
    panels = {
        "head": heads if "head" in kinds else [],
        "sublayer or block": [label for kind, label in others.items() if kind in kinds],
    }
    maps = {
        title: np.full((config.layers, len(labels)), np.nan, dtype=np.float64)
        for title, labels in panels.items()
        if labels
    }
    for part, change in changes.items():
        if part.head is not None:
            maps["head"][part.layer, part.head] = change
        else:
            column = panels["sublayer or block"].index(others[part.kind])
            maps["sublayer or block"][part.layer, column] = change
    widths = [max(0.62 * values.shape[1], 2.4) for values in maps.values()]
    figure, _ = _figure(sum(widths) + 2.6, 0.42 * config.layers + 2.2, is_empty=True)
    grid = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for axes, (title, values) in zip(grid, maps.items(), strict=True):
        _draw_changes(figure, axes, values, panels[title])
        axes.set_xlabel(title)
    grid[0].set_ylabel("layer")
    figure.suptitle(f"{name}: rise of the loss without each part, nats per token", fontsize=11)
    _save(figure, path)


def _draw_changes(
    figure: Any, axes: Any, values: Float64[np.ndarray, "layers parts"], labels: Sequence[str]
) -> None:
    """Draw a heat map with a number in each cell."""
    low, high = min(float(values.min()), 0.0), float(values.max())
    image = axes.imshow(values, cmap=_COLORS, vmin=low, vmax=high, aspect="auto")
    middle = (low + high) / 2
    for (layer, column), change in np.ndenumerate(values):
        color = "black" if change > middle else "white"
        axes.text(column, layer, f"{change:.2f}", ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_yticks(range(len(values)), [str(layer) for layer in range(len(values))], fontsize=8)
    figure.colorbar(image, ax=axes)


def _spread(
    points: Float32[np.ndarray, "tokens 2"], first: Sequence[int], is_text: Sequence[bool]
) -> list[int]:
    """Return the points to label: `first`, then texts far enough from all others so far."""
    span = np.maximum(np.ptp(points, axis=0), np.finfo(np.float32).tiny)
    placed = points / span * np.array([15.0, 40.0], dtype=np.float32)  # labels are wide
    chosen = list(first)
    for index in range(len(points)):
        if len(chosen) >= _MAX_POINT_LABELS:
            break
        if not is_text[index]:
            continue
        distances = np.square(placed[chosen] - placed[index]).sum(axis=1)
        if not chosen or distances.min() > 1.0:
            chosen.append(index)
    return chosen


def _figure(width: float, height: float, *, is_empty: bool = False) -> tuple[Any, Any]:
    """Return a figure of this size in inches, and its axes."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, None if is_empty else figure.subplots()


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context  # noqa: PLC0415 - an extra

    kind = path.suffix[1:].lower()
    metadata = {"Date": None} if kind == "svg" else {}
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "nanovllm"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, format=kind, dpi=_DPI, metadata=metadata)


def _label(model: InspectedModel, token_id: int, limit: int = _MAX_TOKEN_CHARACTERS) -> str:
    """Return a token's text with visible white space, or its bytes, cut at `limit` characters."""
    encoded = model.undecodable_bytes(token_id)
    if encoded is not None:
        text = "".join(f"\\x{byte:02X}" for byte in encoded)
    else:
        text = model.tokenizer.token_text(token_id)
        text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥").replace("$", r"\$")
        text = "".join(one if one.isprintable() else _escape(ord(one)) for one in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _escape(code: int) -> str:
    """Return an invisible character as the page spells it."""
    return f"\\x{code:02X}" if code < 0x80 else f"\\u{{{code:X}}}"
