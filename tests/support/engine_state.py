"""Requests to the routes of the engine's state."""

from typing import Any

from tests.support.serving import RunningServer

STATE, EVENTS, STEPS, CONTROL, VOCABULARY = (
    f"/v1/engine/{name}" for name in ("state", "events", "steps", "control", "vocabulary")
)
STALLED_S = 0.5
SECRET = "the<b>cat</b>"
LONG: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}


def control(server: RunningServer, action: str, **headers: str) -> dict[str, Any]:
    """Give a command and return its answer."""
    response = server.http.post(CONTROL, json={"action": action}, headers=headers)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def state(server: RunningServer) -> dict[str, Any]:
    """Return the state."""
    response = server.http.get(STATE)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found
