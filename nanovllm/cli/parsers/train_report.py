"""The parser of `nanovllm train-report`."""

import argparse
from pathlib import Path

from nanovllm.cli.parsers.parser import add_command

_DESCRIPTION = """
Write the report of a training run as an HTML page: losses, learning rate, gradient norm,
throughput, samples and settings. Several runs are compared in one page. The page needs no network.

`nanovllm train` writes report.html in its output folder at each evaluation; this command writes it
again, or compares runs. A folder of runs stands for all of them.

  nanovllm train-report runs/shakespeare
  nanovllm train-report runs/lr-1e-3 runs/lr-3e-3 --output comparison.html
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train-report`."""
    parser = add_command(
        subparsers,
        "train-report",
        "nanovllm.cli.train_report:run",
        arguments="RUN... [--output FILE]",
        summary="write the report of training runs",
        description=_DESCRIPTION,
        variables=(),
    )
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
