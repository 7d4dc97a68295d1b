"""Tiles of linear layers on the CPU's tile unit, which add to their accumulators in memory.

    panel row    | w0 | w1 | w2 | w3 |   a register of weights for each 16 columns of the panel
    16 inputs    | a |                   one register, of as many rows as the tile has
                                         accumulators[column] += a @ w[column], every 16 steps

The registers of weights and inputs are loaded for each 16 steps: five loads of 1 KiB for four
multiplications, which take twice as long where the piece is in the first-level cache. An
accumulator adds one instruction's sum every 16 steps of the panel from its beginning, whatever the
number of rows. So a row's result has the same bits alone and among many rows.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import UNIT_STEPS, KernelTarget
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.tile_unit import (
    INPUTS,
    ROW_BYTES,
    UNIT_COLUMNS,
    UNIT_ROWS,
    WEIGHTS,
    tile_unit,
)
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors


def make_unit_tiles(
    target: KernelTarget, weights: str, prefetch_lines: int, *, nontemporal: bool = False
) -> Any:
    """Return tiles, with the arguments of make_tiles(...) in tiles.py.

    The number of steps is a multiple of UNIT_STEPS, and tiles have up to 16 rows.
    """
    columns = range(target.panel_width // UNIT_COLUMNS)
    step_lines = UNIT_STEPS * prefetch_lines

    def emit_tiles(
        v: Vectors, height: Value, first: Value, tiles: Value, inputs: Rows, panel: Rows,
        steps: Value, out: Rows, prefetch_ptr: Value, ahead_bytes: Value,
    ) -> None:  # fmt: skip
        """Emit `tiles` tiles of `height` rows, from row `first` on."""
        unit = tile_unit(v, weights)
        unit.configure(height)
        with v.range(tiles) as tile:
            row = first + tile * UNIT_ROWS
            outs = [Rows(out.row(row) + column * ROW_BYTES, out.stride_bytes) for column in columns]
            for column in columns:
                unit.load(column, outs[column])
            before_bytes = row // UNIT_ROWS * steps * (prefetch_lines * LINE_BYTES)
            lines_ptr = prefetch_ptr + before_bytes - before_bytes // ahead_bytes * ahead_bytes
            with v.range(steps, UNIT_STEPS) as step:
                in_ptr, step_ptr = inputs.row(row) + step * WORD_BYTES, panel.row(step)
                unit.load(INPUTS, Rows(in_ptr, inputs.stride_bytes))
                for column in columns:
                    register = WEIGHTS[column % len(WEIGHTS)]
                    unit.load(register, Rows(step_ptr + column * ROW_BYTES, panel.stride_bytes))
                    unit.multiply_add(column, register)
                    for line in range(column, step_lines, len(columns)):
                        ahead_ptr = lines_ptr + step * (prefetch_lines * LINE_BYTES)
                        v.prefetch(ahead_ptr, line * LINE_BYTES, nontemporal=nontemporal)
            for column in columns:
                unit.store(column, outs[column])
        unit.release()

    emitted_tiles = kernel(target, emit_tiles)

    @compiled
    def tiles(
        inputs: Any, panel: Any, steps: int, out: Any, rows: int, prefetch_ptr: int,
        ahead_bytes: int,
    ) -> None:  # fmt: skip
        first = 0
        while first < rows:  # twice at most: all whole tiles, and the rest
            height = min(UNIT_ROWS, rows - first)
            count = (rows - first) // height
            emitted_tiles(
                height, first, count, inputs, panel, steps, out, prefetch_ptr, ahead_bytes
            )
            first += count * height

    return tiles
