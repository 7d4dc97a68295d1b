"""Write the numbers and pictures that docs/tutorials shows.

Run: python tools/make_tutorials.py [PAGE ...] [--check]

Each module of tools/tutorials computes one page. Some pages show what was measured:

    python tools/tutorials/dynamics.py --data shakespeare.txt     trainings
    python tools/tutorials/quantization.py                        losses and speeds
    python tools/tutorials/bits.py                                answers alone and in company

These keep their results in a file beside the module, from which the page is made.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.tutorials import backpropagation, batching, bits, dynamics, models, quantization
from tools.tutorials.pages import Tutorial

TUTORIALS: dict[str, Callable[[], Tutorial]] = {
    module.PAGE: module.tutorial
    for module in (backpropagation, batching, bits, dynamics, models, quantization)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; return 1 if one is not up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=", ".join(TUTORIALS))
    parser.add_argument("--check", action="store_true", help="compare only")
    parsed = parser.parse_args(arguments)
    status = 0
    for name, make in TUTORIALS.items():
        if parsed.pages and name not in parsed.pages:
            continue
        tutorial = make()
        if not parsed.check:
            tutorial.write()
        for problem in tutorial.problems():
            print(problem, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
