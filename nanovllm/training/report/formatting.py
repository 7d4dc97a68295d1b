"""Numbers, durations and commands for people."""

import math
import os
import re
import shlex
from pathlib import Path

MISSING = "–"  # noqa: RUF001 - an en dash stands for a missing value
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_count(value: float | None) -> str:
    """Return a whole number with separators: 12,345."""
    return MISSING if value is None else f"{value:,.0f}"


def format_compact(value: float | None) -> str:
    """Return a number in three digits with a suffix: 12.3M. Below 10,000 it is a whole number."""
    if value is None:
        return MISSING
    for unit, suffix in _SUFFIXES:
        # 999,950 rounds to 1.00M, not to 1000k.
        if abs(value) >= max(unit * 0.9995, 10_000 * 0.99995):
            digits = max(0, 2 - int(math.log10(max(1.0, abs(value) / unit * 1.0005))))
            return f"{value / unit:.{digits}f}{suffix}"
    return f"{value:,.0f}"


def format_loss(value: float | None) -> str:
    """Return a loss with four decimals; without decimals if it is 1,000 or more."""
    return f"{value:.4f}" if value is not None and abs(value) < 1000 else format_number(value)


def format_number(value: float | None) -> str:
    """Return a number with five significant digits: 0.0003, 21,400, 3e-5."""
    if value is None:
        return MISSING
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return _short_exponent(f"{value:.5g}")


def format_perplexity(loss: float | None) -> str:
    """Return exp(loss)."""
    if loss is None or loss > math.log(1e15):
        return MISSING
    perplexity = math.exp(loss)
    return f"{perplexity:.2f}" if perplexity < 1000 else format_compact(perplexity)


def format_duration(seconds: float | None) -> str:
    """Return a duration in its two largest units: 1 h 02 min."""
    if seconds is None or seconds < 0:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def format_ticks(ticks: list[float]) -> list[str]:
    """Return the labels of a linear axis, all in one unit: 0, 5k, 10k."""
    largest = max(map(abs, ticks), default=0.0)
    unit, suffix = next(
        ((unit, suffix) for unit, suffix in _SUFFIXES if largest >= max(unit, 10_000)), (1.0, "")
    )
    return ["0" if tick == 0 else _short_exponent(f"{tick / unit:.6g}") + suffix for tick in ticks]


def quote_folder(path: Path) -> str:
    """Return a folder as the name of a model on the command line; a bare name may be a bundled one.

    The folder `tiny-books` is ./tiny-books.
    """
    is_bare = len(path.parts) == 1 and not path.is_absolute() and path.parts[0] != ".."
    return quote_path(f"./{path}" if is_bare else path)


def quote_path(path: str | Path) -> str:
    """Return a path as an argument on this system's command line."""
    text = str(path)
    if os.name != "nt":
        return shlex.quote(text)
    return f'"{text}"' if re.search(r"[\s&()^%;,=]", text) else text


def _short_exponent(text: str) -> str:
    """Return 3e-5 for 3e-05."""
    return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", text)
