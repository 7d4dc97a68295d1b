"""The command `sgpt`."""

import os
import subprocess
import sys
from pathlib import Path

from checks import KEY, MODEL, PROMPT, V1, works


def sgpt(*arguments: str) -> str:
    settings = {
        "OPENAI_API_KEY": KEY, "API_BASE_URL": V1, "DEFAULT_MODEL": MODEL, "USE_LITELLM": "false",
        "OPENAI_USE_FUNCTIONS": "false", "PRETTIFY_MARKDOWN": "false",
    }  # fmt: skip
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "sgpt"), *arguments],
        env={**os.environ, **settings}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-1500:]
    return ran.stdout


@works
def answers() -> None:
    assert sgpt("--no-cache", PROMPT).strip()


@works
def a_chat_that_is_kept() -> None:
    """Its second turn needs more than 512 tokens, since the program sets no limit for an answer."""
    assert sgpt("--no-cache", "--chat", f"talk-{os.getpid()}", PROMPT).strip()
