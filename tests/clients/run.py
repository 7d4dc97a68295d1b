"""Run every client against a server of the bundled model, and write docs/reference/clients.md.

Run: make clients, or make clients ONLY=litellm,openai
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.clients.clients import CLIENTS, Client
from tests.clients.environments import CACHE, HERE, InstallError, command, prepare, versions
from tests.clients.report import PAGE, Check, Result, read_results, render, write_results
from tests.support.serve_command import Serving

MODEL = "tiny-books"
KEY = "key-of-the-client-checks"
ROOT = HERE.parents[1]
QUIET = {
    "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "PROMPTFOO_DISABLE_TELEMETRY": "1", "PROMPTFOO_DISABLE_UPDATE": "1", "NO_PROXY": "127.0.0.1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}  # fmt: skip
"""Keep clients from asking anyone but the server."""


def main() -> int:
    """Run the clients that are named, or all; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="names of clients, with commas between")
    names = [name for name in parser.parse_args().only.split(",") if name]
    unknown = set(names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(c.name for c in CLIENTS)}"
        )
    chosen = [client for client in CLIENTS if not names or client.name in names]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends
    flags = ("--chat-template", str(HERE / "chat_template.jinja"), "--max-queued-requests", "256")
    num_failures = 0
    with Serving(MODEL, *flags, variables={"NANOVLLM_API_KEY": KEY}) as serving:
        for client in chosen:
            result = run_client(client, serving.port)
            num_failures += len(result.failures)
            write_results({**read_results(), client.name: result})
            PAGE.write_text(render(read_results()), encoding="utf-8")
    return int(num_failures > 0)


def run_client(client: Client, port: int) -> Result:
    """Run one client's script in its environment."""
    print(f"{client.name}: ", end="", flush=True)
    try:
        folder = prepare(client)
    except InstallError as failed:
        print("not run, cannot be installed")
        return Result({}, (), f"cannot be installed: {str(failed).strip().splitlines()[-1][:200]}")
    recorded = CACHE / "results" / f"{client.name}.jsonl"
    log = CACHE / "logs" / f"{client.name}.log"
    for path in (recorded, log):
        path.parent.mkdir(exist_ok=True)
        path.write_text("", encoding="utf-8")
    error = _run_script(client, folder, _variables(port, recorded), log)
    lines = recorded.read_text(encoding="utf-8").splitlines()
    checks = [Check(**json.loads(line)) for line in lines]
    if error is None and not checks:
        error = "recorded no check"
    if error is not None:
        checks.append(Check("the script", None, error))
    result = Result(versions(client, folder), tuple(checks))
    print(f"{len(checks) - len(result.failures)} of {len(checks)} checks passed")
    for check in result.failures:
        print(f"  {check.name}: {(check.error or '')[:400]}")
    return result


def _variables(port: int, recorded: Path) -> dict[str, str]:
    home = CACHE / "home"  # clients keep settings and histories there
    home.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    return {
        **kept, **QUIET, "HOME": str(home), "NANOVLLM_URL": url,
        "NANOVLLM_MODEL": MODEL, "NANOVLLM_ROOT": str(ROOT), "NANOVLLM_RESULTS": str(recorded),
        "NANOVLLM_MODEL_FOLDER": str(ROOT / "nanovllm" / "bundled" / MODEL),
        "OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{url}/v1",
    }  # fmt: skip


def _run_script(client: Client, folder: Path, variables: dict[str, str], log: Path) -> str | None:
    """Return why the script failed as a whole, if it did; whatever it started ends with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(client, folder), cwd=folder, env=variables,
            stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(client.timeout_s)
        except subprocess.TimeoutExpired:
            return f"took longer than {client.timeout_s:g} s"
        finally:
            _end_group(process)
    return None if code == 0 else f"exit code {code}: {log.read_text(errors='replace')[-800:]}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
