"""One run at a time writes a folder."""

import os
import sys
from pathlib import Path

import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.run.lock import lock_folder


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        with lock_folder(folder):
            with (
                pytest.raises(TrainingError, match=rf"in use .*process {os.getpid()} on .*Ctrl-C"),
                lock_folder(folder),
            ):
                pass
            assert folder.is_dir()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written"), lock_folder(tmp_path / "file/x"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("kept")
    (tmp_path / ".lock-owner").symlink_to(other)
    with lock_folder(tmp_path):
        pass
    assert other.read_text() == "kept"
