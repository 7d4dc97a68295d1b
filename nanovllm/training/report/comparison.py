"""The page's content about several runs: their results, curves, differing settings and samples."""

from collections.abc import Sequence

from nanovllm.training.report.chart import Line, render_key
from nanovllm.training.report.curves import has_different_tokens, render_compared_curves
from nanovllm.training.report.formatting import (
    MISSING,
    format_compact,
    format_count,
    format_duration,
    format_loss,
    format_perplexity,
)
from nanovllm.training.report.markup import Markup, element, join
from nanovllm.training.report.run import Run
from nanovllm.training.report.settings import differing_settings
from nanovllm.training.report.summary import (
    render_commands,
    render_notices,
    render_prompt_note,
    render_sample,
    render_scrollable,
    render_state,
)


def render_comparison(runs: Sequence[Run]) -> Markup:
    """Return the header and the sections of several runs."""
    names = unique_names(runs)
    states = [
        element(
            "li",
            render_key(Line("", [], color=index)),
            element("span", name, class_="run-name"),
            " ",
            render_state(run),
            " ",
            element("span", f"step {_format_steps(run)}", class_="note"),
            render_notices(run),
        )
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    header = element(
        "header",
        element("p", "nanovllm training report", class_="eyebrow"),
        element("h1", f"{len(runs)} runs compared"),
        element("ul", *states, class_="runs"),
    )
    return join(
        (
            header,
            _render_results(runs, names),
            render_compared_curves(runs, names),
            _render_differences(runs, names),
            _render_samples(runs, names),
            _render_best_commands(runs, names),
        )
    )


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run's folder, with as many parent folders as tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def _render_results(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    losses = [None if run.best is None else run.best.val_loss for run in runs]
    bits = [run.bits_per_byte for run in runs]
    shown_losses, shown_bits = list(map(format_loss, losses)), list(map(_format_bits, bits))
    if not _has_different_texts(runs):
        shown_bits = _highlight_lowest(bits, shown_bits)
        if not has_different_tokens(runs):
            shown_losses = _highlight_lowest(losses, shown_losses)
    columns = {
        "Run": [
            join((render_key(Line("", [], color=index)), name)) for index, name in enumerate(names)
        ],
        "State": [render_state(run) for run in runs],
        "Best validation loss": shown_losses,
        "at step": ["" if run.best is None else format_count(run.best.step) for run in runs],
        "Perplexity": list(map(format_perplexity, losses)),
        "Bits per byte": shown_bits,
        "Parameters": [format_compact(run.number("model", "parameters")) for run in runs],
        "Steps": list(map(_format_steps, runs)),
        "Tokens": [format_compact(run.last("tokens")) for run in runs],
        "Tokens per second": [format_count(run.tokens_per_s) for run in runs],
        "Time": [format_duration(run.last("elapsed_s")) for run in runs],
    }
    head = element("tr", *(element("th", title, scope="col") for title in columns))
    rows = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
        for first, *rest in zip(*columns.values(), strict=True)
    ]
    table = element(
        "table", element("thead", head), element("tbody", *rows), class_="numbers results"
    )
    return element(
        "section",
        element("h2", "Results"),
        render_scrollable(table),
        _render_warning(runs),
    )


def _render_best_commands(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the commands that use the best run; empty if their losses cannot be compared."""
    if _has_different_texts(runs):
        return Markup()
    bits = [run.bits_per_byte for run in runs]
    losses = [None if run.best is None else run.best.val_loss for run in runs]
    scores = losses if None in bits else bits
    known = [(score, index) for index, score in enumerate(scores) if score is not None]
    if not known:
        return Markup()
    _, best = min(known)
    return render_commands(runs[best], f"Use the best model, {names[best]}")


def _format_steps(run: Run) -> str:
    total = "" if run.total_steps is None else f" of {format_count(run.total_steps)}"
    return f"{format_count(run.step)}{total}"


def _format_bits(bits: float | None) -> str:
    return MISSING if bits is None else f"{bits:.3f}"


def _highlight_lowest(values: Sequence[float | None], shown: Sequence[str]) -> list[str]:
    lowest = min((value for value in values if value is not None), default=None)
    return [
        element("strong", text) if value is not None and value == lowest else text
        for value, text in zip(values, shown, strict=True)
    ]


def _has_different_texts(runs: Sequence[Run]) -> bool:
    return len({run.number("data", "validation_bytes") for run in runs}) > 1


def _render_warning(runs: Sequence[Run]) -> Markup:
    """Return a note if the losses are of different tokens or texts."""
    if _has_different_texts(runs):
        note = "The runs have different validation texts, so their losses cannot be compared."
    elif has_different_tokens(runs) and all(run.bits_per_byte_factor for run in runs):
        note = (
            "The runs have different tokenizers, so their losses per token cannot be compared. "
            "The losses below are in bits per byte."
        )
    else:
        return Markup()
    return element("p", note, class_="notice")


def _render_differences(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    rows = differing_settings(runs)
    if not rows:
        body = element("p", "The runs have the same settings.", class_="note")
    else:
        heads = (element("th", name, scope="col") for name in names)
        head = element("tr", element("th", "Setting", scope="col"), *heads)
        lines = (
            element("tr", element("th", name, scope="row"), *(element("td", one) for one in values))
            for name, values in rows
        )
        table = element("table", element("thead", head), element("tbody", *lines))
        body = render_scrollable(table)
    return element("section", element("h2", "Settings that differ"), body)


def _render_samples(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    articles = [
        element(
            "article",
            element("h3", f"{name} · step {format_count(run.samples[-1].step)}"),
            render_sample(run.samples[-1]),
            class_="sample card",
        )
        for run, name in zip(runs, names, strict=True)
        if run.samples
    ]
    if not articles:
        return Markup()
    return element(
        "section",
        element("h2", "Last samples"),
        render_prompt_note([run.samples[-1] for run in runs if run.samples]),
        element("div", *articles, class_="samples compared"),
    )
