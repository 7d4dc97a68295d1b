"""The lines of the reader's files in a traceback."""

from pathlib import Path
from traceback import FrameSummary, extract_tb


def readers_lines(error: BaseException, folder: Path) -> list[FrameSummary]:
    """Return the lines of the files in `folder` that led to an exception, the last one last."""
    frames = extract_tb(error.__traceback__)
    return [frame for frame in frames if Path(frame.filename).parent == folder]
