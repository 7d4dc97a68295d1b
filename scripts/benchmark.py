"""Measure speed: `nanovllm bench` for a clone where the package is not installed.

Run: python scripts/benchmark.py latency models/gpt2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
