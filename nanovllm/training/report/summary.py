"""The page's content about one run."""

from collections.abc import Sequence
from typing import TypeVar

from nanovllm.training.metrics import Evaluation, Sample
from nanovllm.training.report.curves import render_run_curves
from nanovllm.training.report.formatting import (
    MISSING,
    format_compact,
    format_count,
    format_duration,
    format_loss,
    format_number,
    format_perplexity,
    quote_folder,
    quote_path,
)
from nanovllm.training.report.markup import Markup, element, join
from nanovllm.training.report.run import Run
from nanovllm.training.report.settings import render_settings

STATES = {
    "running": "Running",
    "finished": "Finished",
    "stopped": "Stopped",
    "failed": "Failed",
    "unknown": "State unknown",
}
_RESUME_LABELS = {
    "running": "Continue this run if its process was killed",
    "stopped": "Continue this run",
    "failed": "Continue this run from its last checkpoint",
}
_MAX_SAMPLES = 50
_MAX_SAMPLE_CHARACTERS = 4000
_MAX_TABLE_ROWS = 100
_MAX_MESSAGE_CHARACTERS = 2000
_COLUMNS = {
    "step": format_count,
    "train_loss": format_loss,
    "val_loss": format_loss,
    "lr": format_number,
    "grad_norm": format_number,
    "tokens_per_s": format_count,
    "tokens": format_compact,
    "elapsed_s": format_duration,
}
_HEADINGS = ("Step", "Training loss", "Validation loss", "Learning rate", "Gradient norm",
             "Tokens/s", "Tokens", "Time")  # fmt: skip
_T = TypeVar("_T")


def render_run(run: Run) -> Markup:
    """Return the header and the sections of one run."""
    return join(
        (
            _render_header(run),
            _render_tiles(run),
            render_run_curves(run),
            render_samples(run),
            render_commands(run),
            render_settings(run),
            _render_table(run.evaluations),
        )
    )


def render_state(run: Run) -> Markup:
    """Return the state of a run as a badge."""
    return element("span", STATES[run.state], class_=f"badge {run.state}")


def render_notices(run: Run) -> Markup:
    """Return why the run ended, whether it overfits, and what could not be read."""
    message = run.message
    if len(message) > _MAX_MESSAGE_CHARACTERS:
        message = f"{message[:_MAX_MESSAGE_CHARACTERS]}…"
    kind = "notice failed" if run.state == "failed" else "notice"
    # A finished run's message says that all steps were taken.
    is_shown = message and not (run.state == "finished" and run.step == run.total_steps)
    shown = [element("p", message, class_=kind)] if is_shown else []
    notices = [*filter(None, [run.overfitting]), *run.notices]
    return join([*shown, *(element("p", notice, class_="notice") for notice in notices)])


def select(items: Sequence[_T], limit: int) -> list[_T]:
    """Return at most `limit` items at equal distances, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[index * (len(items) - 1) // (limit - 1)] for index in range(limit)]


def render_sample(sample: Sample) -> Markup:
    """Return the text of a sample, cut at a bounded length, with its prompt marked."""
    text = sample.text
    if len(text) > _MAX_SAMPLE_CHARACTERS:
        text = f"{text[:_MAX_SAMPLE_CHARACTERS]}…"
    size = min(len(sample.prompt), _MAX_SAMPLE_CHARACTERS)
    prompt = element("mark", text[:size]) if size else ""
    # The parser drops a line break that follows <pre>.
    return element("pre", "\n", prompt, text[size:], dir="auto", class_="sample-text")


def render_prompt_note(samples: Sequence[Sample]) -> Markup:
    """Return the caption of marked prompts; empty if no sample has one."""
    if not any(sample.prompt for sample in samples):
        return Markup()
    prompt = element("mark", "marked")
    text = " beginning of a sample is its prompt, the first tokens of the validation text."
    return element("p", "The ", prompt, text, class_="note")


def _render_header(run: Run) -> Markup:
    total = run.total_steps
    place = f"step {format_count(run.step)}"
    if total is not None:
        place += f" of {format_count(total)} · {100 * run.step // total} %"
    elapsed_s = run.last("elapsed_s")
    if run.state == "running" and total is not None and run.step and elapsed_s:
        left_s = elapsed_s / run.step * (total - run.step)
        place += f" · {format_duration(left_s)} left"
    progress = element(
        "progress",
        max=total,
        value=run.step,
        aria_label="progress of the run in steps",
        class_=run.state,
    )
    return element(
        "header",
        element("p", "nanovllm training report", class_="eyebrow"),
        element("h1", run.name),
        element("p", render_state(run), " ", element("span", place), class_="status"),
        progress if total is not None else "",
        render_notices(run),
    )


def _render_tiles(run: Run) -> Markup:
    best = run.best
    loss = None if best is None else best.val_loss
    bits = run.bits_per_byte
    total = run.total_steps
    at_step = "" if best is None else f"at step {format_count(best.step)}"
    layers, width = (run.number("model", name) for name in ("layers", "width"))
    sizes = "" if layers is None or width is None else f"{layers:g} layers, {width:g} wide"
    tiles = (
        ("Best validation loss", format_loss(loss), at_step),
        ("Perplexity", format_perplexity(loss), "of the best checkpoint"),
        ("Bits per byte", MISSING if bits is None else f"{bits:.3f}", "of validation text"),
        ("Steps", format_count(run.step), "" if total is None else f"of {format_count(total)}"),
        ("Tokens", format_compact(run.last("tokens")), "seen in training"),
        (
            "Tokens per second",
            format_count(run.tokens_per_s),
            f"median; last {format_count(run.last('tokens_per_s'))}",
        ),
        ("Time", format_duration(run.last("elapsed_s")), "of training and evaluation"),
        ("Parameters", format_compact(run.number("model", "parameters")), sizes),
    )
    return element(
        "section",
        element("h2", "Summary", class_="visually-hidden"),
        element(
            "dl",
            *(
                element(
                    "div",
                    element("dt", label),
                    element("dd", value),
                    element("dd", note, class_="note") if note and value != MISSING else "",
                    class_="tile card",
                )
                for label, value, note in tiles
            ),
            class_="tiles",
        ),
    )


def render_scrollable(table: Markup) -> Markup:
    """Return a table that scrolls sideways where the page is narrow, with a hint there."""
    hint = element("p", "Scroll the table sideways to see all columns.", class_="note scroll-hint")
    return join((hint, element("div", table, class_="scroll card", tabindex="0")))


def render_samples(run: Run) -> Markup:
    """Return the samples over time, the last first; the script shows one at a time."""
    if not run.samples:
        return Markup()
    losses = {one.step: one.val_loss for one in run.evaluations}
    shown = select(run.samples, _MAX_SAMPLES)
    articles = []
    for sample in reversed(shown):
        loss = losses.get(sample.step)
        note = "" if loss is None else f" · validation loss {format_loss(loss)}"
        title = f"Step {format_count(sample.step)}{note}"
        articles.append(
            element("article", element("h3", title), render_sample(sample), class_="sample card")
        )
    count = f"{len(run.samples):,} samples"
    if len(run.samples) > len(shown):
        count += f", of which {len(shown)} are shown"
    return element(
        "section",
        element("h2", "Samples over time"),
        element("p", f"Text that the model generated at each evaluation: {count}.", class_="note"),
        render_prompt_note(shown),
        element("div", *articles, class_="samples", id="samples"),
    )


def render_commands(run: Run, title: str = "Use the model") -> Markup:
    """Return the commands that use the checkpoint; empty if there is none yet."""
    if run.best is None:
        return Markup()
    model = quote_folder(run.folder)
    commands = {
        "Serve the best checkpoint over HTTP": f"nanovllm serve {model}",
        "Continue a prompt on the terminal": f"nanovllm generate --model {model}",
    }
    if run.state in _RESUME_LABELS:
        commands[_RESUME_LABELS[run.state]] = f"nanovllm train --resume {quote_path(run.folder)}"
    rows = [
        part
        for label, command in commands.items()
        for part in (element("dt", label), element("dd", element("code", command)))
    ]
    return element(
        "section",
        element("h2", title),
        element("dl", *rows, class_="card commands"),
    )


def _render_table(evaluations: Sequence[Evaluation]) -> Markup:
    """Return the evaluations as numbers, at most `_MAX_TABLE_ROWS` of them."""
    if not evaluations:
        return Markup()
    shown = select(evaluations, _MAX_TABLE_ROWS)
    rows = [
        element(
            "tr",
            *(element("td", write(getattr(one, name))) for name, write in _COLUMNS.items()),
        )
        for one in reversed(shown)
    ]
    summary = f"Evaluations ({len(evaluations):,}"
    summary += f"; {len(shown)} are shown)" if len(evaluations) > len(shown) else ")"
    head = element("tr", *(element("th", title, scope="col") for title in _HEADINGS))
    table = element("table", element("thead", head), element("tbody", *rows), class_="numbers")
    note = "A training loss is the mean over the steps since the evaluation before."
    return element(
        "section",
        element(
            "details",
            element("summary", element("h2", summary)),
            element("p", note, class_="note"),
            render_scrollable(table),
            id="evaluations",
        ),
    )
