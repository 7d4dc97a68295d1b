"""Start a program of this package in its own process, so that it disturbs no measurement."""

import asyncio
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


async def start_program(name: str, *flags: str) -> asyncio.subprocess.Process:
    """Start tests.load.NAME and wait for its first line; raises RuntimeError if there is none."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"tests.load.{name}", *flags,
        cwd=_ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    if not await process.stdout.readline():
        raise RuntimeError(f"{name} did not start")
    return process
