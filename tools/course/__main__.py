"""Write the picture of each step beside its page: python -m tools.course."""

import sys
from importlib import import_module
from pathlib import Path

from nanovllm.learn.course import STEPS, Step

STEPS_FOLDER = Path(__file__).parents[2] / "nanovllm" / "learn" / "steps"


def picture_of(step: Step) -> str:
    """Return a step's picture as SVG."""
    return str(import_module(f"tools.course.{step.module}").draw())


def main() -> int:
    """Write all pictures."""
    for step in STEPS:
        path = STEPS_FOLDER / step.module / "picture.svg"
        path.write_text(picture_of(step), encoding="utf-8")
        print(f"wrote {path.relative_to(STEPS_FOLDER.parents[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
