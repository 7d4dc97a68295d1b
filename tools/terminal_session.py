"""Record docs/images/terminal.svg: run real commands and draw what they print.

Run: python tools/terminal_session.py

The server and the commands run on this machine with the bundled model. The picture plays once:
every piece of output appears when the command printed it, with pauses shortened to a second. A
viewer without animations shows the whole session.
"""

import argparse
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "terminal.svg"
COMMANDS = (
    (
        "curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        """     -d '{"prompt": "She smiled and said", "max_tokens": 25, "seed": 24}' \\\n"""
        "     | jq .choices[0].text"
    ),
    'nanovllm generate "The old man looked at her and" --temperature 0.7 --seed 43 --max-tokens 40',
)
_COLUMNS = 98
_PAUSE_S, _LONGEST_PAUSE_S, _TYPING_S = 0.8, 1.0, 0.5
_START_TIMEOUT_S, _COMMAND_TIMEOUT_S = 120.0, 60.0
_CHARACTER, _LINE, _MARGIN, _BAR = 8.4, 20, 18, 36  # pixels
_STYLE = """
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  text { fill: #d1d7e0; white-space: pre; }
  .command { fill: #ffffff; font-weight: 600; }
  .prompt { fill: #57ab5a; font-weight: 600; }
  .title { fill: #9198a1; font-size: 13px; }
  @keyframes appear { from { opacity: 0; } to { opacity: 1; } }
  @media (prefers-reduced-motion: no-preference) {
    .piece { animation: appear 1ms linear backwards; }
  }
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A command or a part of an output, and when it appeared, in seconds since the start."""

    at_s: float
    text: str
    is_command: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the session and draw it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="FILE")
    parsed = parser.parse_args(arguments)
    parsed.output.write_text(draw(record(COMMANDS)), encoding="utf-8")
    print(parsed.output)
    return 0


def record(commands: Sequence[str]) -> list[Piece]:
    """Start the server, run the commands one after another, and return all that was printed."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "nanovllm"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nanovllm "$@"\n')
        program.chmod(0o755)
        paths = f"{folder}{os.pathsep}{os.environ['PATH']}"
        with _running("nanovllm serve --num-threads 2", paths) as server:
            pieces = [Piece(0.0, "nanovllm serve &", is_command=True)]
            pieces += _output(server, pieces[0].at_s + _TYPING_S, until="curl http")
            for command in commands:
                at_s = pieces[-1].at_s + _PAUSE_S
                pieces.append(Piece(at_s, command, is_command=True))
                with _running(command, paths) as process:
                    pieces += _output(process, at_s + _TYPING_S)
                    if process.wait():
                        raise RuntimeError(f"{command} failed with {process.returncode}")
    return pieces


@contextmanager
def _running(command: str, paths: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command}" if "|" not in command else command],
        cwd=ROOT,
        env={**os.environ, "PATH": paths, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def _output(process: "subprocess.Popen[bytes]", at_s: float, until: str = "") -> list[Piece]:
    """Read the output to its end, or to the line that contains `until`."""
    assert process.stdout is not None
    pieces: list[Piece] = []
    read_s = time.monotonic()
    deadline_s = read_s + (_START_TIMEOUT_S if until else _COMMAND_TIMEOUT_S)
    text = ""
    while not (until and until in text and text.endswith("\n")):
        if not select.select([process.stdout], [], [], deadline_s - time.monotonic())[0]:
            raise TimeoutError(f"no output after {text!r}")
        data = os.read(process.stdout.fileno(), 4096).decode()
        if not data:
            break
        text += data
        now_s = time.monotonic()
        at_s += min(now_s - read_s, _LONGEST_PAUSE_S)
        read_s = now_s
        pieces.append(Piece(at_s, data))
    pieces[-1] = replace(pieces[-1], text=pieces[-1].text.rstrip("\n") + "\n")
    return pieces


def draw(pieces: Sequence[Piece]) -> str:
    """Return the session as an animated SVG."""
    spans: list[str] = []
    row, column = 0, 0
    for piece in pieces:
        style = f'style="animation-delay: {piece.at_s:.2f}s"'
        if piece.is_command:
            row, column = row + bool(column) + bool(spans), 0
            spans.append(_span(row, 0, "$", f'class="piece prompt" {style}'))
        kind = "command" if piece.is_command else "output"
        start = 2 if piece.is_command else 0
        for number, line in enumerate(piece.text.split("\n")):
            if number:
                row, column = row + 1, 0
            for part in _wrapped(line, max(column, start)):
                if column >= _COLUMNS:
                    row, column = row + 1, 0
                column = max(column, start)
                if part:
                    spans.append(_span(row, column, part, f'class="piece {kind}" {style}'))
                column += len(part)
                start = 0
        if piece.is_command:
            row, column = row + 1, 0
    width = round(2 * _MARGIN + _COLUMNS * _CHARACTER)
    height = _BAR + (row + 1) * _LINE + _MARGIN
    buttons = "".join(
        f'<circle cx="{20 + 20 * index}" cy="18" r="6" fill="{colour}"/>'
        for index, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="terminal session">\n'
        f"<title>nanovllm in a terminal</title>\n<style>{_STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" rx="10" fill="#151b23" stroke="#3d444d"/>\n'
        f'{buttons}\n<text class="title" x="{width / 2}" y="23" text-anchor="middle">'
        "nanovllm</text>\n" + "\n".join(spans) + "\n</svg>\n"
    )


def _wrapped(line: str, column: int) -> list[str]:
    """Split a line where a terminal would wrap it; the first part starts at `column`."""
    first = _COLUMNS - column
    rest = [line[start : start + _COLUMNS] for start in range(max(first, 0), len(line), _COLUMNS)]
    return [line[: max(first, 0)], *rest]


def _span(row: int, column: int, text: str, attributes: str) -> str:
    x = _MARGIN + column * _CHARACTER
    y = _BAR + (row + 1) * _LINE
    width = len(text) * _CHARACTER  # the same columns in every font
    return (
        f'<text {attributes} x="{x:.1f}" y="{y}" textLength="{width:.1f}" '
        f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
    )


if __name__ == "__main__":
    sys.exit(main())
