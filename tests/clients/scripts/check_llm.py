"""The command `llm`, with models of extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
from pathlib import Path

from checks import KEY, MODEL, PROMPT, V1, works

FOLDER = Path(os.environ["HOME"]) / "llm"
FOLDER.mkdir(parents=True, exist_ok=True)
(FOLDER / "extra-openai-models.yaml").write_text(
    f"""- model_id: tale
  model_name: {MODEL}
  api_base: {V1}
  api_key_name: tale
- model_id: completion
  model_name: {MODEL}
  api_base: {V1}
  api_key_name: tale
  completion: true
""",
    encoding="utf-8",
)
(FOLDER / "keys.json").write_text(json.dumps({"tale": KEY}), encoding="utf-8")


def llm(*arguments: str) -> str:
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "llm"), *arguments],
        env={**os.environ, "LLM_USER_PATH": str(FOLDER)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@works
def chats() -> None:
    assert llm("prompt", "-m", "tale", PROMPT, "-o", "max_tokens", "8").strip()


@works
def chats_whole() -> None:
    assert llm("prompt", "-m", "tale", PROMPT, "-o", "max_tokens", "8", "--no-stream").strip()


@works
def conversations() -> None:
    assert llm("prompt", "--continue", "-m", "tale", "And then?", "-o", "max_tokens", "8").strip()


@works
def completions() -> None:
    assert llm("prompt", "-m", "completion", PROMPT, "-o", "max_tokens", "8").strip()
