"""Take docs/images/inspector*: screenshots and a short animation of the inspector's page.

Run: python tools/screenshots.py [--only playground] [--no-animation]
     python tools/screenshots.py --report RUN     (training-report.png, of a run of nanovllm train)

Needs the extra `browser` and Chromium. The script starts a server of the bundled model with a small
KV cache, and sends it more requests than fit, so that some of them wait and are preempted.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import ROOT
from benchmarks.scaling.deployments import Deployment
from benchmarks.server_process import ServerProcess
from nanovllm.training.report import read_run, render_report

FOLDER = ROOT / "docs" / "images"
VIEWS = (
    *("playground", "chat", "engine", "attention", "attention-row", "attention-parts", "lens"),
    "embeddings",
)
SIZES = {"": (1280, 900), "-narrow": (390, 844)}
SCHEMES: dict[str, Literal["light", "dark"]] = {"": "light", "-dark": "dark"}
ANIMATION_SIZE, ANIMATION_WIDTH = (1120, 780), 840
MAX_ANIMATION_BYTES = 1_500_000
REPORT_SIZE = (1100, 960)
_SERVER_SETTINGS = (
    "--num-threads", "1", "--kv-cache-memory", "11MiB", "--max-num-seqs", "8", "--block-size", "16",
    "--inspector-shows-prompts",
)  # fmt: skip
_PROMPTS = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age",
    "It was the best of times, it was the worst of times, it was the season of light and the old",
    "The old man looked at the sea and",
    "In the morning the children",
)
_MESSAGES = ("What did the old sailor see?", "And where did he go?")
_ACTION_TIMEOUT_MS, _REQUEST_TIMEOUT_S = 60_000, 120.0
_NUM_CLIENTS = 14
_COLORS = 255
_LONGEST_FRAME_MS, _LAST_FRAME_MS = 400, 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER")
    parser.add_argument("--only", choices=VIEWS, action="append", help="view to take; repeatable")
    parser.add_argument(
        "--variants", action="store_true", help="take each view in dark and narrow, too"
    )
    parser.add_argument("--no-animation", action="store_true", help="take screenshots only")
    parser.add_argument("--report", type=Path, metavar="RUN", help="take this run's report alone")
    parsed = parser.parse_args(arguments)
    if parsed.report is not None:
        with _chromium() as browser:
            print(take_report(browser, parsed.report, parsed.output))
        return 0
    with ServerProcess(_SERVER_SETTINGS) as server, _chromium() as browser:
        url = f"http://127.0.0.1:{server.port}/"
        for view in parsed.only or VIEWS:
            with _load(url) if view == "engine" else nullcontext():
                for picture in take_view(browser, url, view, parsed.output, parsed.variants):
                    print(picture)
        if not parsed.no_animation:
            recording = Recording(browser.new_page(viewport=_viewport(ANIMATION_SIZE)))
            record_playground(recording, url)
            with _load(url):
                record_engine(recording)
            write_animation(recording, parsed.output / "inspector.webp")
            print(parsed.output / "inspector.webp")
    return 0


def take_view(
    browser: Browser, url: str, view: str, folder: Path, has_variants: bool
) -> Iterator[Path]:
    """Take a view, wide and light; with variants, at each size, light and dark."""
    for size_name, size in SIZES.items():
        for scheme_name, scheme in SCHEMES.items():
            if (size_name or scheme_name) and not has_variants:
                continue
            context = browser.new_context(
                viewport=_viewport(size),
                color_scheme=scheme,
                device_scale_factor=2 if size_name else 1,
            )
            page = context.new_page()
            page.set_default_timeout(_ACTION_TIMEOUT_MS)
            page.goto(f"{url}#{view.partition('-')[0]}")
            _PREPARE[view](page)
            path = folder / f"inspector-{view}{size_name}{scheme_name}.png"
            _write_png(page.screenshot(), path)
            context.close()
            yield path


def take_report(browser: Browser, run: Path, folder: Path) -> Path:
    """Take the top of a training run's report."""
    path = folder / "training-report.png"
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "report.html"
        file.write_text(render_report([read_run(run)]), encoding="utf-8")
        page = browser.new_page(viewport=_viewport(REPORT_SIZE))
        page.goto(file.as_uri())
        page.locator("svg.chart").first.wait_for()
        _write_png(page.screenshot(), path)
    return path


def _prepare_playground(page: Page) -> None:
    _fill_settings(page, seed="24", temperature="0.8", max_tokens="48")
    _generate(page)
    token = page.locator(".choice .token").nth(6)
    token.hover()
    page.locator("#tooltip").wait_for()


def _prepare_chat(page: Page) -> None:
    _fill_settings(page, seed="24", temperature="0.8", max_tokens="48")
    for number, message in enumerate(_MESSAGES):
        page.locator("[name=message]").fill(message)
        page.keyboard.press("Enter")
        page.locator(".chat-turn.assistant:not(.running)").nth(number).wait_for()


def _fill_settings(page: Page, **values: str) -> None:
    """Fill in settings, whose card is folded in a narrow window."""
    summary = page.locator("[role=tabpanel]:visible .settings-summary")
    is_folded = not page.locator("[role=tabpanel]:visible [name=seed]").is_visible()
    if is_folded:
        summary.click()
    for name, value in values.items():
        page.locator(f"[role=tabpanel]:visible [name={name}]").fill(value)
    if is_folded:
        summary.click()


def _generate(page: Page) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator(".choice:not(.running) .figures:not([hidden])").first.wait_for()


def _prepare_engine(page: Page) -> None:
    page.locator("#panel-engine canvas:visible, #panel-engine svg:visible").first.wait_for()
    page.wait_for_timeout(4000)  # until the figures of the last seconds are filled
    size = page.viewport_size
    if size is not None and size["width"] > size["height"]:  # the blocks are below the requests
        page.set_viewport_size({"width": size["width"], "height": size["width"]})
        page.wait_for_timeout(500)


def _prepare_inspection(page: Page) -> None:
    """Run the view's form with its own prompt, where it does not run by itself."""
    panel = page.locator("[role=tabpanel]:visible")
    panel.locator("button.primary").first.click()
    panel.locator("canvas:visible, table:visible").first.wait_for()
    page.wait_for_timeout(1500)


def _prepare_row(page: Page) -> None:
    """Scroll to how a row of attention is computed."""
    page.locator(".v-row-card tbody").wait_for()
    page.wait_for_timeout(1500)
    _scroll_to(page, ".v-row-card")


def _prepare_parts(page: Page) -> None:
    """Measure each part of the network, and switch a head off."""
    card = page.locator(".v-ablation")
    card.get_by_role("button", name="Measure each part").click()
    card.locator(".v-part", has_text="+").first.wait_for()
    card.get_by_role("button", name="layer 1, head 2").click()
    card.get_by_text("Off: layer").wait_for()
    page.wait_for_timeout(1500)
    size, box = page.viewport_size, card.bounding_box()
    if size is not None and box is not None:
        height = min(size["height"], round(box["height"]) + 120)  # the header and the margins
        page.set_viewport_size({"width": size["width"], "height": height})
    _scroll_to(page, ".v-ablation")


def _scroll_to(page: Page, selector: str) -> None:
    """Scroll until an element is below the header."""
    page.evaluate(
        """(selector) => {
            const { top } = document.querySelector(selector).getBoundingClientRect();
            scrollBy(0, top - document.getElementById("top").offsetHeight - 8);
        }""",
        selector,
    )


def _prepare_embeddings(page: Page) -> None:
    page.locator("[role=tabpanel]:visible canvas:visible").first.wait_for()
    page.wait_for_timeout(1500)


_PREPARE: dict[str, Callable[[Page], None]] = {
    "playground": _prepare_playground,
    "chat": _prepare_chat,
    "engine": _prepare_engine,
    "attention": _prepare_inspection,
    "attention-row": _prepare_row,
    "attention-parts": _prepare_parts,
    "lens": _prepare_inspection,
    "embeddings": _prepare_embeddings,
}


@dataclass(slots=True)
class Recording:
    """Screenshots of a page, and when they were taken."""

    page: Page
    frames: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def take(self) -> None:
        """Add a frame."""
        self.frames.append(self.page.screenshot())
        self.times_s.append(time.monotonic())

    def take_for(self, seconds: float) -> None:
        """Add frames for a while."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.take()
            self.page.wait_for_timeout(100)


def record_playground(recording: Recording, url: str) -> None:
    """Record a generation, and a continuation from an alternative."""
    page = recording.page
    page.set_default_timeout(_ACTION_TIMEOUT_MS)
    page.goto(url)
    _fill_settings(page, seed="24", temperature="0.8", max_tokens="40")
    recording.take()
    page.get_by_role("button", name="Generate", exact=True).click()
    recording.take_for(2.5)
    page.locator(".choice:not(.running) .figures:not([hidden])").first.wait_for()
    for position in (4, 5, 6):
        page.locator(".choice .token").nth(position).hover()
        recording.take_for(0.5)
    page.locator(".choice .token").nth(6).click()
    recording.take_for(0.8)
    page.locator(".popover .bar-button").nth(2).hover()
    recording.take_for(0.5)
    page.locator(".popover .bar-button").nth(2).click()
    recording.take_for(2.5)


def record_engine(recording: Recording) -> None:
    """Record the engine at work on several requests, and its blocks."""
    page = recording.page
    page.get_by_role("tab", name="Engine").click()
    recording.take_for(3.5)
    page.get_by_role("heading", name="KV cache blocks").evaluate(
        "element => scrollTo(0, scrollY + element.getBoundingClientRect().top - 340)"
    )
    recording.take_for(3.5)


def _viewport(size: tuple[int, int]) -> ViewportSize:
    return {"width": size[0], "height": size[1]}


def _write_png(content: bytes, path: Path) -> None:
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    picture.quantize(_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def write_animation(recording: Recording, path: Path) -> None:
    """Write a WebP, as good as fits into MAX_ANIMATION_BYTES."""
    width, height = ANIMATION_SIZE
    size = (ANIMATION_WIDTH, round(ANIMATION_WIDTH * height / width))
    pictures = [
        Image.open(io.BytesIO(frame)).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        for frame in recording.frames
    ]
    gaps = zip(recording.times_s, recording.times_s[1:], strict=False)
    durations = [min(round(1000 * (after - before)), _LONGEST_FRAME_MS) for before, after in gaps]
    durations.append(_LAST_FRAME_MS)
    for quality in (80, 65, 50, 35):
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=durations, loop=0,
            quality=quality, method=4,
        )  # fmt: skip
        if path.stat().st_size <= MAX_ANIMATION_BYTES:
            return
    raise RuntimeError(f"{path} has more than {MAX_ANIMATION_BYTES} bytes")


@contextmanager
def _load(url: str) -> Iterator[None]:
    """Send requests from several clients until the end."""
    ending, deployment = threading.Event(), Deployment(url.rstrip("/"))

    def send(number: int) -> None:
        body = {
            "prompt": _PROMPTS[number % len(_PROMPTS)], "max_tokens": 60 + 23 * number % 190,
            "ignore_eos": True, "seed": number,
        }  # fmt: skip
        while not ending.wait(0.05):
            deployment.ask("/v1/completions", body, _REQUEST_TIMEOUT_S)

    clients = [threading.Thread(target=send, args=(number,)) for number in range(_NUM_CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        ending.set()
        for client in clients:
            client.join()


@contextmanager
def _chromium() -> Iterator[Browser]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise SystemExit("Chromium is not installed")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox"] if is_root else []
        )
        yield browser
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
