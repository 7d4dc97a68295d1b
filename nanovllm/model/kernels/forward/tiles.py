"""Tiles of the forward pass, which add to their accumulators in memory (simd/tile.py).

In a batched tile every row has a panel of its own.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.formats import Format
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.rows import Rows, rows_from
from nanovllm.model.kernels.simd.tile import TILE_ROWS, TileInput, emit_tile
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

_BATCHED_ROWS = 3


@compiled
def _tile_height(rows: int) -> int:
    """Return the number of rows of the next tile, of `rows` rows.

    7 and 8 rows are 4 + 3 and 4 + 4, not 6 + 1 and 6 + 2: a tile of one or two rows has too few
    chains to hide the latency of a multiply-add.
    """
    return 4 if rows in (7, 8) else min(rows, TILE_ROWS)


def make_tiles(
    target: KernelTarget,
    panel_format: Format,
    vectors: int,
    prefetch_lines: int,
    *,
    nontemporal: bool = False,
) -> Any:
    """Return tiles: out[rows, columns] += inputs[rows, steps] @ panel[steps, columns].

    inputs        input rows
    panel         rows of words, one for each step
    steps         number of steps
    out           rows of accumulators, float32 or int32
    rows          number of rows; tiles have up to 6
    prefetch_ptr  first cache line to prefetch
    ahead_bytes   bytes to prefetch

    The panel is `vectors` vectors wide. Every step prefetches the next `prefetch_lines` lines. Each
    tile continues to prefetch where the one before ended. Once `ahead_bytes` are prefetched, the
    next tile begins at `prefetch_ptr` again.
    """

    def emit_tile(
        v: Vectors, height: Value, inputs: Rows, panel: Rows, steps: Value, out: Rows,
        prefetch_ptr: Value,
    ) -> None:  # fmt: skip
        def prefetch(k: Value) -> None:
            for line in range(prefetch_lines):
                lines_ptr = prefetch_ptr + k * (prefetch_lines * LINE_BYTES)
                v.prefetch(lines_ptr, line * LINE_BYTES, nontemporal=nontemporal)

        for rows in range(1, TILE_ROWS + 1):
            with v.when(height == rows):
                outs = [out.row(row) for row in range(rows)]
                _emit_rows(v, panel_format, vectors, inputs, [panel], steps, outs, prefetch)

    tile = kernel(target, emit_tile)

    @compiled
    def tiles(
        inputs: Any, panel: Any, steps: int, out: Any, rows: int, prefetch_ptr: int,
        ahead_bytes: int,
    ) -> None:  # fmt: skip
        prefetched_bytes = 0
        while rows > 0:
            height = _tile_height(rows)
            tile(height, inputs, panel, steps, out, prefetch_ptr + prefetched_bytes)
            inputs, out = rows_from(inputs, height), rows_from(out, height)
            rows -= height
            prefetched_bytes += steps * prefetch_lines * LINE_BYTES
            if prefetched_bytes >= ahead_bytes:
                prefetched_bytes = 0

    return tiles


def make_batched_tiles(target: KernelTarget, panel_format: Format, vectors: int) -> Any:
    """Return tiles: out[r, columns] += inputs[r, steps] @ panels[r, steps, columns] of each row r.

    inputs                 input rows
    panels                 the panel of each row
    step_bytes             bytes from one step of a panel to the next
    steps                  number of steps
    out                    rows of accumulators, float32
    rows                   number of rows; batched tiles have up to 3
    prefetch_offset_bytes  bytes from the words being read to those to prefetch, or negative; unused
                           where the target does not prefetch_next_block
    """

    def emit_tile(
        v: Vectors, height: Value, inputs: Rows, panels: Rows, step_bytes: Value, steps: Value,
        out: Rows, prefetch_offset_bytes: Value,
    ) -> None:  # fmt: skip
        def emit_rows(rows: int) -> None:
            def prefetch(k: Value) -> None:
                for panel in row_panels if target.prefetch_next_block else ():
                    step_ptr = panel.ptr + prefetch_offset_bytes + k * step_bytes
                    for offset_bytes in range(0, vectors * v.lanes * WORD_BYTES, LINE_BYTES):
                        v.prefetch(step_ptr, offset_bytes)

            row_panels = [Rows(panels.row(row), step_bytes) for row in range(rows)]
            outs = [out.row(row) for row in range(rows)]
            _emit_rows(v, panel_format, vectors, inputs, row_panels, steps, outs, prefetch)

        for rows in range(1, _BATCHED_ROWS + 1):
            with v.when(height == rows):
                emit_rows(rows)

    tile = kernel(target, emit_tile)

    @compiled
    def tiles(
        inputs: Any, panels: Any, step_bytes: int, steps: int, out: Any, rows: int,
        prefetch_offset_bytes: int,
    ) -> None:  # fmt: skip
        while rows > 0:
            height = min(rows, _BATCHED_ROWS)
            tile(height, inputs, panels, step_bytes, steps, out, prefetch_offset_bytes)
            inputs, out = rows_from(inputs, height), rows_from(out, height)
            panels = rows_from(panels, height)
            rows -= height

    return tiles


def _emit_rows(
    v: Vectors,
    panel_format: Format,
    vectors: int,
    inputs: Rows,
    panels: list[Rows],
    steps: Value,
    out_ptrs: list[Value],
    prefetch: Callable[[Value], None],
) -> None:
    """Emit a tile that adds to the rows at `out_ptrs`; see `emit_tile`."""
    load = v.load_words if panel_format.accumulates_int32 else v.load
    offsets_bytes = range(0, vectors * v.lanes * WORD_BYTES, v.lanes * WORD_BYTES)
    tile_inputs = TileInput(inputs.ptr, inputs.stride_bytes, panel_format.input_bytes)
    start = [[load(out_ptr, offset) for offset in offsets_bytes] for out_ptr in out_ptrs]
    sums = emit_tile(v, panel_format, tile_inputs, panels, steps, start, prefetch=prefetch)
    for out_ptr, row_sums in zip(out_ptrs, sums, strict=True):
        for offset, total in zip(offsets_bytes, row_sums, strict=True):
            v.store(total, out_ptr, offset)
