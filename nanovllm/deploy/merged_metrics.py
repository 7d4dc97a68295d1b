"""Merge the /metrics of several replicas into one page."""

import re
from collections.abc import Iterable

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (.*)")


def merge_metrics(pages: Iterable[tuple[str, str]]) -> str:
    """Return pages in Prometheus's text format as one, each sample with the label `replica`.

    Each metric's HELP and TYPE lines appear once, followed by the samples of all pages.

    Args:
        pages: the name of each replica, and its page.
    """
    comments: dict[str, dict[str, str]] = {}  # by metric, then HELP or TYPE
    samples: dict[str, list[str]] = {}
    for replica, page in pages:
        metric = ""
        for line in page.split("\n"):
            if line.startswith("#"):
                kind, metric = line.split(" ", 3)[1:3]
                comments.setdefault(metric, {}).setdefault(kind, line)
            elif (match := _SAMPLE.fullmatch(line)) is not None:
                labels = f'replica="{replica}"' + (f",{match[2]}" if match[2] else "")
                samples.setdefault(metric, []).append(f"{match[1]}{{{labels}}} {match[3]}")
    lines = [
        line
        for metric, head in comments.items()
        for line in (*head.values(), *samples.get(metric, ()))
    ]
    return "".join(f"{line}\n" for line in lines)
