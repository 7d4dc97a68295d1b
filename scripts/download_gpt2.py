"""Run `nanovllm download` in a clone without installing the package, only its dependencies.

Run: python scripts/download_gpt2.py --model gpt2 --output ./models/gpt2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if sys.version_info < (3, 10):  # noqa: UP036 - people run this file with whatever Python they have
    sys.exit(
        f"nanovllm needs Python 3.10 or newer; this is {sys.version_info[0]}.{sys.version_info[1]}"
    )
try:
    from nanovllm.cli.main import main
except ModuleNotFoundError as error:
    sys.exit(
        f"{error}. Install the dependencies first: run `make install` and then "
        ".venv/bin/python instead of python, or `pip install -e .`"
    )

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
