"""What all client scripts share: the server's address, and checks whose outcomes are recorded.

A script runs in the environment of its client, with this folder first on its path. Only the
standard library is imported.
"""

import asyncio
import inspect
import json
import os
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL = os.environ["NANOVLLM_URL"]
V1 = f"{URL}/v1"
KEY = os.environ["OPENAI_API_KEY"]
MODEL = os.environ["NANOVLLM_MODEL"]
FOLDER = os.environ["NANOVLLM_MODEL_FOLDER"]
DIMENSIONS: int = json.loads((Path(FOLDER) / "config.json").read_text(encoding="utf-8"))["n_embd"]

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Variables of a command that must not ask the hub for a tokenizer or a data set."""

PROMPT = "The rabbit said that"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Tell a tale."},
    {"role": "user", "content": "Who went into the garden?"},
]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
}
"""Not closed by `additionalProperties`, as many clients send their schemas."""


def works(check: Callable[[], Any]) -> None:
    """Run a check that must not raise; its name says what works."""
    try:
        _run(check)
    except Exception as error:  # noqa: BLE001 - whatever a client raises is the outcome
        traceback.print_exc()
        _record(check, None, f"{type(error).__name__}: {error}")
    else:
        _record(check, None, None)


def refused(reason: str, *, naming: str) -> Callable[[Callable[[], Any]], None]:
    """Run a check that the server must refuse, with `naming` in the error; document `reason`."""

    def decorate(check: Callable[[], Any]) -> None:
        try:
            _run(check)
        except Exception as error:  # noqa: BLE001 - whatever a client raises is the outcome
            is_expected = naming in str(error)
            _record(check, reason, None if is_expected else f"{type(error).__name__}: {error}")
        else:
            _record(check, reason, "was not refused")

    return decorate


def raised_by(call: Callable[[], Any]) -> Exception:
    """Return what `call` raises, which it must."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the caller looks at its class
        return error
    raise AssertionError("nothing was raised")


def load() -> int:
    """Return how many answers the server has not finished."""
    request = urllib.request.Request(f"{URL}/load", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(json.load(answer)["queued_requests"])


def _run(check: Callable[[], Any]) -> None:
    result = check()
    if inspect.isawaitable(result):
        asyncio.run(_wait(result))


async def _wait(result: Any) -> None:
    await result


def _record(check: Callable[[], Any], refusal: str | None, error: str | None) -> None:
    name = check.__name__.replace("_", " ")
    line = json.dumps({"name": name, "refusal": refusal, "error": error and error[-2000:]})
    with Path(os.environ["NANOVLLM_RESULTS"]).open("a", encoding="utf-8") as results:
        results.write(line + "\n")
