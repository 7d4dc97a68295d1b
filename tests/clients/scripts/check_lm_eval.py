"""lm-eval's local-completions on the tasks of examples/evaluate, with the server's tokenizer."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import FOLDER, MODEL, OFFLINE, V1, works

EXAMPLES = Path(os.environ["NANOVLLM_ROOT"]) / "examples" / "evaluate"


def lm_eval(
    kind: str, url: str, tasks: str, *, chat: bool = False, **more: object
) -> dict[str, Any]:
    arguments = {
        "base_url": f"{V1}/{url}",
        "model": MODEL,
        "max_length": 512,
        "max_retries": 1,
        **more,
    }
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [
                str(Path(sys.executable).parent / "lm_eval"), "run", "--model", kind,
                "--include_path", "tasks", "--tasks", tasks,
                "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()),
                "--output_path", folder,
                *(["--apply_chat_template"] if chat else ["--batch_size", "4"]),
            ],
            cwd=EXAMPLES, env={**os.environ, **OFFLINE},
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        (results,) = Path(folder).rglob("results_*.json")
        found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))["results"]
    return found


TASKS = "rabbit_endings,rabbit_text,rabbit_next"
measured: dict[str, Any] = {}


@works
def tasks_with_the_remote_tokenizer() -> None:
    measured.update(
        lm_eval(
            "local-completions", "completions", TASKS, tokenizer_backend="remote",
            custom_prefix_token_id=0, auth_token=os.environ["OPENAI_API_KEY"],
        )
    )  # fmt: skip
    assert 0.5 < measured["rabbit_text"]["bits_per_byte,none"] < 4, measured


@works
def the_same_numbers_with_a_local_tokenizer() -> None:
    found = lm_eval(
        "local-completions", "completions", TASKS,
        tokenizer_backend="huggingface", tokenizer=FOLDER,
    )  # fmt: skip
    bits = [results["rabbit_text"]["bits_per_byte,none"] for results in (measured, found)]
    assert abs(bits[0] - bits[1]) < 1e-6, bits


@works
def local_chat_completions() -> None:
    lm_eval("local-chat-completions", "chat/completions", "rabbit_next", chat=True)
