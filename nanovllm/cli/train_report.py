"""`nanovllm train-report`: the report of a training run, or a comparison of several."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.parser import set_up
from nanovllm.errors import TrainingError

_COMPARISON_FILE = Path("comparison.html")
_DESCRIPTION = """
Write the report of a training run as an HTML page: losses, learning rate, gradient norm,
throughput, samples and settings. Several runs are compared in one page. The page needs no network.

`nanovllm train` writes report.html in its output folder at each evaluation; this command writes it
again, or compares runs. A folder of runs stands for all of them.

  nanovllm train-report runs/shakespeare
  nanovllm train-report runs/lr-1e-3 runs/lr-3e-3 --output comparison.html
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "RUN... [--output FILE]", _DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="output folder of `nanovllm train`, or a folder of them",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="HTML file to write (default: report.html in the folder of one run, comparison.html "
        "for several)",
    )


def run(parsed: argparse.Namespace) -> int:
    """Write the page and print its path."""
    with ended_by_interrupts():
        from nanovllm.training.report import REPORT_FILE, read_run, render_report, write_page
    runs = [read_run(folder) for folder in dict.fromkeys(_find_runs(parsed.runs))]
    default = runs[0].folder / REPORT_FILE if len(runs) == 1 else _COMPARISON_FILE
    output: Path = parsed.output or default
    if output.is_dir():
        raise TrainingError(f"--output {output} is a folder; name a file, such as {REPORT_FILE}")
    if not output.parent.is_dir():
        raise TrainingError(f"--output {output}: there is no folder {output.parent}")
    write_page(render_report(runs), output)
    print(output)
    return 0


def _find_runs(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the folders of runs; a folder of several stands for all of them, by name."""
    from nanovllm.training.report import is_run

    for path in paths:
        inside = [] if is_run(path) or not path.is_dir() else sorted(filter(is_run, path.iterdir()))
        yield from inside or [path]
