"""Files are replaced as a whole or not at all."""

from pathlib import Path

import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.atomic_files import write_atomically


def test_a_failed_write_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match=r"file cannot be written.*No space left.*is kept"):
        write_atomically(path, write)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "old")]
