"""Reports of benchmarks: the machine, a table of figures, and a line of JSON at the end."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from nanovllm import __version__
from nanovllm.cli.table import print_rows
from nanovllm.errors import counted
from nanovllm.model.machine import cpu_name


def describe_machine() -> dict[str, Any]:
    """Return the machine, its software, and the current number of BLAS threads."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    blas = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {
        "cpu": cpu_name(),
        "cores": usable,
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": _blas_name(),
        "blas_threads": blas[0]["num_threads"] if blas else None,
        "nanovllm": __version__,
    }


def publish(
    about: Mapping[str, str],
    figures: Mapping[str, str],
    record: Mapping[str, Any],
    path: Path | None,
) -> None:
    """Print the machine, the settings, a table of figures, and `record` as a line of JSON.

    The line has the machine too, and is also written to `path`, if given.
    """
    machine = describe_machine()
    threads = (
        "its own threads"
        if machine["blas_threads"] is None
        else counted(machine["blas_threads"], "thread")
    )
    lines = {
        "machine": f"{machine['cpu']}, {counted(machine['cores'], 'core')}, {machine['os']}",
        "software": f"nanovllm {__version__}, Python {machine['python']}, "
        f"NumPy {machine['numpy']}, {machine['blas']} with {threads}",
        **about,
    }
    print_rows(lines, 10)
    print()
    print_rows({label: f"{value:>14}" for label, value in figures.items()})
    line = json.dumps({**record, "machine": machine}, allow_nan=False)
    if path is not None:
        path.write_text(line + "\n", encoding="utf-8")
    print(f"\n{line}", flush=True)


def rate(count: float, seconds: float) -> float | None:
    """Return a rate per second; None for a count of zero."""
    return count / seconds if count and seconds else None


def shown(value: float | None, unit: str = "", digits: int = 2) -> str:
    """Format a figure; None is a dash."""
    return "-" if value is None else f"{value:,.{digits}f}{' ' * bool(unit)}{unit}"


def _blas_name() -> str:
    config = np.show_config(mode="dicts") or {}
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown BLAS')} {blas.get('version', '')}".strip()
