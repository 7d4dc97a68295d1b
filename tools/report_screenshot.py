"""Take docs/images/training-report.png: the report of a training run in headless Chromium.

Run: python tools/report_screenshot.py RUN

RUN is the output folder of `nanovllm train`. The report is drawn again first. Chromium or Chrome is
looked up in PATH.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import ROOT
from nanovllm.training.report import read_run, render_report

PICTURE = ROOT / "docs" / "images" / "training-report.png"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_WIDTH, _HEIGHT = 1100, 960  # pixels
_TIMEOUT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the picture of a run's report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of nanovllm train")
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="FILE")
    parser.add_argument("--height", type=int, default=_HEIGHT, metavar="PIXELS")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(render_report([read_run(parsed.run)]), encoding="utf-8")
        take(page, parsed.output, parsed.height)
    print(f"{parsed.output}: {parsed.output.stat().st_size:,} bytes")
    return 0


def take(page: Path, output: Path, height: int) -> None:
    """Write a picture of a page's top in the light colour scheme."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError(f"none of {', '.join(_BROWSERS)} is in PATH; install Chromium")
    command = [
        browser,
        "--headless",
        "--no-sandbox",  # the page is ours, and a container's root may need it
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={_WIDTH},{height}",
        f"--screenshot={output.resolve()}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, timeout=_TIMEOUT_S, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
