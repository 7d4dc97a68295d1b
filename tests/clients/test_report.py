"""The page of clients follows from the kept results, and every client has its files."""

import json
from pathlib import Path

import pytest

from tests.clients.clients import CLIENTS, Client
from tests.clients.environments import HERE
from tests.clients.report import PAGE, Check, Result, read_results, render, write_results

RESULT = Result(
    {"openai": "3.54.0"},
    (
        Check("chats", None, None),
        Check("tools", "tools are not supported", None),
        Check("streams", None, "a | b\nc"),
    ),
)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_has_a_script_and_requirements_that_name_its_packages(client: Client) -> None:
    assert (HERE / "scripts" / client.script).is_file()
    if client.is_node:
        manifest = HERE / "node" / client.environment / "package.json"
        wanted = " ".join(json.loads(manifest.read_text(encoding="utf-8"))["dependencies"])
    else:
        wanted = (HERE / "requirements" / f"{client.environment}.txt").read_text(encoding="utf-8")
    assert all(package in wanted for package in client.packages)


def test_every_script_and_environment_is_of_some_client() -> None:
    scripts = {path.name for path in (HERE / "scripts").glob("check_*")}
    assert scripts == {client.script for client in CLIENTS}
    environments = {path.stem for path in (HERE / "requirements").glob("*.txt")}
    environments |= {path.name for path in (HERE / "node").iterdir()}
    assert environments == {client.environment for client in CLIENTS}


def test_kept_results_are_read_as_they_were(tmp_path: Path) -> None:
    results = {"openai": RESULT, "vllm-bench": Result({}, (), "cannot be installed")}
    write_results(results, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == results


def test_the_page_tells_what_works_what_is_refused_and_what_failed() -> None:
    page = render({"openai": RESULT, "vllm-bench": Result({}, (), "cannot be installed")})
    assert "| openai | openai 3.54.0 | 2 of 3 |\n" in page
    assert "- **openai**: chats\n" in page
    assert "| openai | tools | tools are not supported |\n" in page
    assert "| openai | streams | a \\| b c |\n" in page
    assert "| vllm-bench | cannot be installed |\n" in page


def test_the_page_is_that_of_the_kept_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(read_results())
