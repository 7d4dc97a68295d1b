"""Python in another process whose kernels check every address."""

import os
import subprocess
import sys
from pathlib import Path

from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE

ROOT = Path(__file__).parents[2]


def run_checked(*command: str, check: str = "1", folder: Path) -> str:
    """Run Python with NANOVLLM_CHECK set and return its output."""
    env = os.environ | {"NANOVLLM_CHECK": check, CACHE_VARIABLE: str(folder)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
