"""Draw to a file: attention, the logit lens and token embeddings, for `nanovllm visualize`, and the
heat map of `nanovllm ablate`.
"""

import argparse
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.errors import InvalidRequestError
from nanovllm.evaluation import AblationResult
from nanovllm.hub import resolve_model
from nanovllm.inspection import html_file, pictures, responses
from nanovllm.inspection.attention import attention_weights, head_statistics
from nanovllm.inspection.embeddings import Method, Projection, nearest, project
from nanovllm.inspection.logit_lens import logit_lens
from nanovllm.inspection.observe import InspectedModel
from nanovllm.progress import progress_bar

_NUM_NEIGHBORS = 8  # of each point, in a file


def run_attention(parsed: argparse.Namespace) -> int:
    """Draw the attention weights of a prompt."""
    model = _load(parsed)
    config = model.config
    layers = _chosen("layers", parsed.layers, config.layers)
    heads = _chosen("heads", parsed.heads, config.heads)
    token_ids = model.encode(parsed.prompt)
    layer = layers[0] if len(layers) == 1 else None
    weights = attention_weights(model, token_ids, layer)
    if layer is None:
        weights = weights[layers]
    weights = weights[:, heads].reshape(-1, weights.shape[2])
    statistics = [
        head
        for head in head_statistics(model, token_ids)
        if head.layer in layers and head.head in heads
    ]
    if _is_html(parsed):
        page = html_file.attention_page(model, token_ids, weights, statistics)
        html_file.write_page(page, parsed.output)
    else:
        pictures.draw_attention(model, token_ids, weights, statistics, parsed.output)
    return report_file(parsed.output)


def run_lens(parsed: argparse.Namespace) -> int:
    """Draw the logit lens of a prompt."""
    model = _load(parsed)
    token_ids = model.encode(parsed.prompt)
    lens = logit_lens(model, token_ids, parsed.top)
    if _is_html(parsed):
        html_file.write_page(html_file.lens_page(model, token_ids, lens), parsed.output)
    else:
        pictures.draw_lens(model, token_ids, lens, parsed.output)
    return report_file(parsed.output)


def run_embeddings(parsed: argparse.Namespace) -> int:
    """Draw the embeddings of tokens."""
    model = _load(parsed)
    marked = [] if parsed.prompt is None else model.encode(parsed.prompt)
    projection = _project(model, parsed.method, parsed.limit, marked)
    if _is_html(parsed):
        methods = {parsed.method: projection}
        if parsed.method != "pca":
            methods = {"pca": _project(model, "pca", parsed.limit, marked), **methods}
        token_ids = projection.token_ids
        found = nearest(model, token_ids, _NUM_NEIGHBORS)
        neighbors = {
            token_id: responses.neighbor_entries(model, pairs)
            for token_id, pairs in zip(token_ids, found, strict=True)
        }
        projections = {
            method: responses.projection_entry(model, method, points)
            for method, points in methods.items()
        }
        page = html_file.embeddings_page(model, projections, neighbors, marked)
        html_file.write_page(page, parsed.output)
    else:
        pictures.draw_embeddings(model, projection, marked, parsed.output)
    return report_file(parsed.output)


def draw_ablation(model: str, result: AblationResult, path: Path) -> None:
    """Draw the change of the loss without each part of a model."""
    name = resolve_model(model).name
    changes = {each.part: each.change for each in result.parts}
    if path.suffix.lower() == ".html":
        losses = {each.part: each.loss for each in result.parts}
        entry = responses.ablation_entry(result.model, result.loss, losses)
        intro = (
            f"{result.tokens:,} tokens of {result.bytes:,} bytes: {result.loss:.4f} nats per token"
        )
        html_file.write_page(html_file.ablation_page(name, result.model, entry, intro), path)
    else:
        pictures.draw_ablation(name, result.model, changes, path)


def check_output(path: Path) -> None:
    """Raise an error if a file cannot be written there, or for a package that it needs."""
    if not path.parent.is_dir():
        raise InvalidRequestError(
            f"{path} cannot be written: the folder {path.parent} does not exist"
        )
    if path.suffix.lower() in {".png", ".svg"}:
        pictures.check_packages()


def _load(parsed: argparse.Namespace) -> InspectedModel:
    check_output(parsed.output)
    return InspectedModel.load(resolve_model(parsed.model))


def _is_html(parsed: argparse.Namespace) -> bool:
    return bool(parsed.output.suffix.lower() == ".html")


def _chosen(name: str, numbers: Sequence[int] | None, count: int) -> list[int]:
    """Return the numbers of layers or heads; raises InvalidRequestError for one out of range."""
    chosen = list(range(count)) if numbers is None else list(numbers)
    if chosen[-1] >= count:
        raise InvalidRequestError(
            f"--{name} has {chosen[-1]}, but the model has the {name} 0 to {count - 1}"
        )
    return chosen


def _project(
    model: InspectedModel, method: Method, limit: int, marked: Sequence[int]
) -> Projection:
    if method != "tsne":
        return project(model, method, limit, extra_ids=marked)
    shown = f"t-SNE of {min(limit, model.config.vocab):,} tokens"
    with ended_by_interrupts(), _elapsed_time(shown):
        return project(model, method, limit, extra_ids=marked)


@contextmanager
def _elapsed_time(text: str) -> Iterator[None]:
    """Show the time since the start of the block on a terminal."""
    is_done = threading.Event()
    with progress_bar(desc=text, bar_format="{desc}: {elapsed}", leave=False) as bar:

        def refresh() -> None:
            while not is_done.wait(0.5):
                bar.refresh()

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()


def report_file(path: Path) -> int:
    """Print the size of a file that was written; return the exit code."""
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0
