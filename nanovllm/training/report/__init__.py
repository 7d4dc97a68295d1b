"""The training report: one HTML page about one run, or a comparison of several.

The page needs no network and no script library. Charts are inline SVG, drawn in Python; a short
script adds read-outs and a slider, and the page is complete without it. A Content-Security-Policy
allows this script and this style sheet only, by their hashes.

In reading order:

run         read a run's folder: run.json, metrics.jsonl, samples.jsonl
markup      HTML elements that escape their text
formatting  numbers, durations and commands for people
scales      axis ranges, ticks and downsampling
chart       a line chart as SVG
curves      the charts of one run or of several
settings    the tables of a run's settings
summary     the page's content about one run
comparison  the page's content about several runs
page        the whole page, and its file
"""

from nanovllm.training.report.page import REPORT_FILE, render_report, write_page, write_report
from nanovllm.training.report.run import Run, is_run, load_run

__all__ = [
    "REPORT_FILE",
    "Run",
    "is_run",
    "load_run",
    "render_report",
    "write_page",
    "write_report",
]
