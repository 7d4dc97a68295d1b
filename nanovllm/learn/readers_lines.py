"""The lines of the reader's files in a traceback or in the running code."""

from pathlib import Path
from traceback import FrameSummary, extract_stack, extract_tb
from types import FrameType


def readers_lines(source: BaseException | FrameType | None, folder: Path) -> list[FrameSummary]:
    """Return the lines of the files in `folder` that led to an exception, a frame, or to here.

    The line that was reached last is the last one.
    """
    if isinstance(source, BaseException):
        frames = extract_tb(source.__traceback__)
    else:
        frames = extract_stack(source)
    return [frame for frame in frames if Path(frame.filename).parent == folder]
