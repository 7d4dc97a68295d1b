"""The lines of the reader's files in a traceback or in the running code."""

from pathlib import Path
from traceback import FrameSummary, extract_stack, extract_tb


def readers_lines(error: BaseException | None, folder: Path) -> list[FrameSummary]:
    """Return the lines of the files in `folder` that led to an exception; None for to here.

    The line that was reached last is the last one.
    """
    frames = extract_stack() if error is None else extract_tb(error.__traceback__)
    return [frame for frame in frames if Path(frame.filename).parent == folder]
