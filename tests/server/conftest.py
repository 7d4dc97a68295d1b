"""One server per backend, shared by all tests that do not change it, and its official client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from nanovllm import LLM
from nanovllm.config import EngineConfig
from tests.support.chats import TEMPLATE
from tests.support.serving import ENGINE_SETTINGS, RunningServer, loader


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the default backend, or with both where its subject is a model's numbers.

    What the server makes of the numbers does not depend on who computed them.
    """
    definition = metafunc.definition
    if not definition.get_closest_marker("both_backends"):
        default = EngineConfig().backend
        definition.add_marker(pytest.mark.parametrize("backend", [default], indirect=True))


@pytest.fixture(scope="session", autouse=True)
def chosen_backend(backend: str) -> None:
    """Every server of this package computes with the test's backend."""


@pytest.fixture(scope="session")
def server(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server of the tiny model, with a chat template and the inspector's views."""
    with RunningServer(
        loader(tiny_model), chat_template=TEMPLATE, inspected_folder=tiny_model
    ) as running:
        yield running


@pytest.fixture(scope="session")
def slow_server(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server whose steps take 5 ms, so that there is time to do things while it answers."""
    with RunningServer(loader(tiny_model, step_s=0.005)) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[OpenAI]:
    """The official client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def chat_client(server: RunningServer) -> Iterator[OpenAI]:
    """The official client of the server with a chat template."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def llm(tiny_model: Path, backend: str) -> LLM:
    """The same model without a server between."""
    return LLM(tiny_model, **ENGINE_SETTINGS)
