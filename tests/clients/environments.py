"""Environments of clients in `.clients/`: virtual environments and folders of node modules.

An environment is made once, and again after its requirement file has changed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.clients.clients import Client

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".clients"
INSTALL_TIMEOUT_S = 1200.0
_READY = ".installed"
_UV = shutil.which("uv")


class InstallError(Exception):
    """An environment could not be made; the text has the installer's last lines."""


def prepare(client: Client) -> Path:
    """Return the folder of the client's environment; create or update it if needed."""
    folder = CACHE / client.environment
    source = _requirements(client)
    wanted = source.read_text(encoding="utf-8")
    if not client.is_node:
        wanted += f"# Python {sys.version_info.major}.{sys.version_info.minor}\n"
    ready = folder / _READY
    if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if client.is_node:
        shutil.copy(source, folder)
        _install(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], folder)
    else:
        _install_python(folder, source)
    ready.write_text(wanted, encoding="utf-8")
    return folder


def command(client: Client, folder: Path) -> list[str]:
    """Return the command that runs the client's script in its environment."""
    if not client.is_node:
        return [str(python_of(folder)), str(HERE / "scripts" / client.script)]
    for module in ("checks.mjs", client.script):  # node looks for modules beside the script
        shutil.copy(HERE / "scripts" / module, folder)
    return ["node", client.script]


def versions(client: Client, folder: Path) -> dict[str, str]:
    """Return the installed version of each of the client's packages."""
    if client.is_node:
        manifests = {
            name: folder / "node_modules" / name / "package.json" for name in client.packages
        }
        return {
            name: str(json.loads(path.read_text(encoding="utf-8"))["version"])
            for name, path in manifests.items()
        }
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    ran = subprocess.run(
        [str(python_of(folder)), "-c", code, *client.packages],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(client.packages, ran.stdout.split(), strict=True))


def python_of(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _requirements(client: Client) -> Path:
    if client.is_node:
        return HERE / "node" / client.environment / "package.json"
    return HERE / "requirements" / f"{client.environment}.txt"


def _install_python(folder: Path, source: Path) -> None:
    """Create a virtual environment, with uv if installed, which takes seconds instead of minutes.

    Contradicting requirements have a file of overrides, which needs uv.
    """
    overrides = source.with_suffix(".overrides")
    if overrides.exists() and _UV is None:
        raise InstallError("its requirements need overrides; install uv first")
    _install(
        [sys.executable, "-m", "venv", *(["--without-pip"] if _UV else []), str(folder)], folder
    )
    python = str(python_of(folder))
    pip = [_UV, "pip", "install", "--python", python] if _UV else [python, "-m", "pip", "install"]
    override = ["--override", str(overrides)] if overrides.exists() else []
    _install([*pip, "--quiet", *override, "-r", str(source)], folder)


def _install(arguments: list[str], folder: Path) -> None:
    try:
        ran = subprocess.run(
            arguments,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=INSTALL_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(str(error)) from error
    if ran.returncode:
        raise InstallError((ran.stdout + ran.stderr)[-1000:])
