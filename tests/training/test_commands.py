"""Folders in commands that a user pastes."""

import sys
from pathlib import Path

import pytest

from nanovllm.training.commands import model_argument, resume_command


@pytest.mark.parametrize(
    ("folder", "argument"),
    [
        ("tiny-books", "./tiny-books"),
        ("runs/a", "runs/a"),
        ("../a", "../a"),
        ("./a/", "./a"),  # pathlib drops both
        (".", "."),
    ],
)
def test_a_name_becomes_a_path_that_is_no_bundled_model(folder: str, argument: str) -> None:
    assert model_argument(Path(folder)) == str(argument)
    assert model_argument(Path(folder).absolute()) == str(Path(folder).absolute())


@pytest.mark.skipif(sys.platform == "win32", reason="its shell quotes otherwise")
def test_a_path_with_spaces_is_quoted() -> None:
    assert resume_command("my run") == "nanovllm train --resume 'my run'"
    assert model_argument("my run") == "'./my run'"
