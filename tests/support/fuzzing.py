"""Fuzz a real server of a tiny model with what its OpenAPI document allows and what it forbids.

    make fuzz                              # three minutes
    make fuzz ARGS="--seconds 3600"        # longer
    make fuzz ARGS="--seed 7 -- --include-path /tokenize"

Options after -- are schemathesis's own. A failure is shown with a curl line that repeats it, and
the seed that draws it again. The exit code is then 1.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanovllm.engine.chat.template import ChatTemplate
from tests.support.checkpoints import write_tiny_model
from tests.support.openapi import closed
from tests.support.serving import MODEL, RunningServer, loader

KEY = "the-key"
TEMPLATE = ChatTemplate(
    (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
        "{% endfor %}assistant:"
    ),
    "the fuzzer's",
)
ROOT = Path(__file__).parents[2]


@contextmanager
def fuzzed_server(folder: Path, **changes: Any) -> Iterator[RunningServer]:
    """Run a server with a key, a chat template and priorities. Answers are few and short."""
    load = loader(folder, max_model_len=48, scheduling_policy="priority", **changes)
    with RunningServer(
        load,
        max_queued_requests=32,
        api_keys=(KEY,),
        chat_template=TEMPLATE,
        inspected_folder=folder,
        inspector_controls=True,
    ) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


def narrowed(server: RunningServer) -> dict[str, Any]:
    """Return a server's document closed, with names and ids that would rarely be drawn.

    These are the model's name, and ids of stored responses: one to get, others to delete. The
    stream of the engine's events is left out: it has no end. The engine is never paused.
    """
    copied = closed(server.http.get("/openapi.json").json())
    del copied["paths"]["/v1/engine/events"]
    copied["components"]["schemas"]["ControlRequest"]["properties"]["action"]["enum"] = ["resume"]
    for schema in copied["components"]["schemas"].values():
        if (
            "model" in schema.get("properties", {})
            and "usage" not in schema["properties"]
            and "choices" not in schema["properties"]
        ):
            schema["properties"]["model"] = {"enum": [MODEL, "alias", None]}
    for parameter in copied["paths"]["/v1/models/{model_id}"]["get"]["parameters"]:
        parameter["schema"]["enum"] = [MODEL, "alias"]
    for method, count in (("get", 1), ("delete", 10)):
        for parameter in copied["paths"]["/v1/responses/{response_id}"][method]["parameters"]:
            parameter["schema"]["enum"] = [_stored_response(server) for _ in range(count)]
    return copied


def _stored_response(server: RunningServer) -> str:
    """Return the id of a new response that the server keeps."""
    answered = server.http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1})
    return str(answered.raise_for_status().json()["id"])


def fuzz(
    server: RunningServer,
    document: Mapping[str, Any],
    options: Sequence[str],
    *,
    timeout_s: float | None = None,
) -> tuple[int, str]:
    """Run schemathesis; return its exit code, and what it printed where there is a time limit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "openapi.json"
        file.write_text(json.dumps(document))
        (Path(folder) / "schemathesis.toml").write_text(
            "max-stream-events = 100000\n"
        )  # otherwise it reads the beginning of a stream only
        command = [
            *(
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                str(file),
                "--url",
                server.url,
                "--header",
                f"Authorization: Bearer {KEY}",
            ),
            *(
                "--checks",
                "all",
                "--exclude-checks",
                "positive_data_acceptance",
            ),  # what the model or fields together forbid is a 400
            *(
                "--suppress-health-check",
                "all",
                "--warnings",
                "off",
                "--request-timeout",
                "30",
                "--generation-database",
                "none",
                "--no-color",
            ),
            *options,
        ]
        environment = {
            **os.environ,
            "SCHEMATHESIS_HOOKS": "tests.support.fuzz_checks",
            "PYTHONPATH": str(ROOT),
        }
        captured = timeout_s is not None
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=captured,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    return done.returncode, f"{done.stdout}{done.stderr}" if captured else ""


def main() -> int:
    """The command of `make fuzz`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=int, default=180, help="how long to draw new requests (%(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.randrange(2**32),
        help="draws the same requests again; otherwise drawn and shown",
    )
    parser.add_argument("--workers", type=int, default=2, help="clients at once (%(default)s)")
    parser.add_argument("--backend", default="numba", help="numba or numpy (%(default)s)")
    parser.add_argument("options", nargs="*", help="schemathesis's own, after --")
    parsed = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        fuzzed_server(write_tiny_model(Path(folder)), backend=parsed.backend) as server,
    ):
        bounds = [
            "--seed",
            str(parsed.seed),
            "--max-time",
            str(parsed.seconds),
            "--workers",
            str(parsed.workers),
            "--continue-on-failure",
        ]
        code, _ = fuzz(server, narrowed(server), [*bounds, *parsed.options])
        assert server.http.get("/health").status_code == 200, "the server is not healthy any more"
        assert server.is_idle(), "requests were left behind"
    return code


if __name__ == "__main__":
    sys.exit(main())
