"""Machine code that comes with a wheel: shared objects for common CPUs, in the folder `shipped`.

A source tree has none, and compiles. scripts/kernel_wheel.py adds them to a wheel, under names that
say what they were compiled from and for. They are not used where Numba's variables name a CPU, or
NANOVLLM_KERNELS asks for a compilation.
"""

import os
import sys
from pathlib import Path

from nanovllm.model.kernels.build.codegen import choice_of

FOLDER = Path(__file__).parents[1] / "shipped"
KERNELS_VARIABLE = "NANOVLLM_KERNELS"
CPU_VARIABLES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")


def find_shipped(name: str) -> Path | None:
    """Return the path of a shared object, if this installation has it and should use it.

    Raises ValueError if the variable NANOVLLM_KERNELS is not valid.
    """
    choice, is_named = choice_of(KERNELS_VARIABLE, "compile"), {*CPU_VARIABLES} & {*os.environ}
    if sys.platform != "linux" or choice or is_named:
        return None
    path = FOLDER / f"{name}.so"
    return path if path.is_file() else None
