"""Install a wheel in an empty environment, and run its programs there."""

import json
import os
import socket
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from packaging.requirements import Requirement

import nanovllm

START_TIMEOUT_S = 180.0  # the first start compiles


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 300.0
) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))} gave {done.returncode}\n"
        f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def required(requirements: Iterable[str], extra: str = "") -> Iterator[Distribution]:
    """Yield the installed distributions that these requirements name, and all that those need."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found = distribution(requirement.name)
            assert requirement.specifier.contains(found.version, prereleases=True), requirement
            yield found
            for name in ("", *requirement.extras):
                yield from required(found.requires or [], name)


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment with a wheel and its dependencies; return its folder of programs.

    The dependencies are links to those of this environment, which `pip install` got from the index.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    print_folder = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    packages = Path(run(python, "-c", print_folder, cwd=folder))
    for found in required(metadata_of(wheel).get_all("Requires-Dist", [])):
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (packages / name).exists():
                (packages / name).symlink_to(str(found.locate_file(name)))
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", *options, wheel, cwd=folder)
    return programs


def metadata_of(wheel: Path) -> Message:
    """Return the fields of the wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        info = f"nanovllm-{nanovllm.__version__}.dist-info"
        return HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())


@contextmanager
def serving(
    environment: Path, folder: Path, env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`nanovllm serve` with no model named, ready to answer, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [environment / "nanovllm", "serve", "--port", str(port)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_ready(url):
            assert server.poll() is None, (
                f"the server ended with {server.returncode}:\n{log.read_text()}"
            )
            assert time.monotonic() < deadline_s, (
                f"the server is not ready after {START_TIMEOUT_S:.0f} s:\n{log.read_text()}"
            )
            time.sleep(0.1)
        yield server, url
    finally:
        server.kill()
        server.wait()


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except HTTPError as error:  # 503 while the model is being loaded
        error.close()
        return False
    except (URLError, ConnectionError):
        return False


def served_model(url: str) -> str:
    with urlopen(f"{url}/v1/models", timeout=5) as response:
        return str(json.load(response)["data"][0]["id"])


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
