"""The generated pages of the reference are up to date and complete."""

import re
from pathlib import Path

import pytest

from nanovllm.cli.environment import VARIABLES
from tools.make_reference import FOLDER, pages, parse_help

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["options.md", "settings.md", "request-fields.md", "ray-serve.md"])
def test_a_generated_page_is_up_to_date(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == pages()[FOLDER / name], "run python tools/make_reference.py"


def test_every_option_in_the_documentation_is_on_the_page() -> None:
    listed = set(re.findall(r"--[a-z][a-z0-9-]+", (FOLDER / "options.md").read_text("utf-8")))
    assert len(listed) > 100
    text = "".join(page.read_text("utf-8") for page in FOLDER.glob("*.md"))
    of_commands = re.findall(r"`(--[a-z][a-z0-9-]+)(?: [A-Z]+)?`", text)
    assert {name for name in of_commands if name not in listed} <= {"--prot", "--once", "--help"}


def test_the_registry_has_every_variable_that_the_package_reads() -> None:
    pattern = re.compile(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"")
    read = {
        name
        for path in (ROOT / "nanovllm").rglob("*.py")
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    assert read <= VARIABLES.keys()


def test_a_help_text_is_read_by_groups() -> None:
    text = """usage: nanovllm serve [MODEL] [options]

Serve a model.

positional arguments:
  MODEL                a folder

options:
  -h, --help           show this help message and exit

server:
  --host HOST          address (default: 127.0.0.1)
  --a-very-long-option LONG
                       what it does

environment variables:
  NANOVLLM_API_KEY     keys
"""
    command = parse_help("nanovllm serve", text)
    assert command.usage == "nanovllm serve [MODEL] [options]"
    assert [(option.name, option.text) for option in command.groups["server"]] == [
        ("--host HOST", "address (default: 127.0.0.1)"),
        ("--a-very-long-option LONG", "what it does"),
    ]
    assert list(command.groups) == ["positional arguments", "options", "server"]
