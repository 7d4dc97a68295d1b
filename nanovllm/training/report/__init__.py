"""The training report: one HTML page about one run, or a comparison of several.

Python reads the folders of runs and writes what the page says as JSON; nanovllm/pages/assets has
the script that draws it, with the charts and colours of the inspector. The page needs no network.

In reading order:

run      read a run's folder: run.json, metrics.jsonl, steps.jsonl and samples.jsonl
content  what the page says of a run, as JSON of a bounded size
page     the page and its file
"""

from nanovllm.training.report.page import REPORT_FILE, render_report, write_page, write_report
from nanovllm.training.report.run import Run, is_run, read_run

__all__ = [
    "REPORT_FILE",
    "Run",
    "is_run",
    "read_run",
    "render_report",
    "write_page",
    "write_report",
]
