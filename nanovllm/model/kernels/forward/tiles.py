"""The innermost loops: up to 6 input rows times a panel, with all accumulators in registers.

A tile walks down a panel once. A step of it is, with panels 4 vectors wide and 6 input rows:

    panel row    | w0 w1 w2 w3 |  4 vectors of words, loaded in memory order
    input row 0  | a0 |           one word of each input row, broadcast to a vector
    ...
    input row 5  | a5 |
                                  24 multiply-adds: accumulators[row][vector] += a[row] * w[vector]

An accumulator is one chain of multiply-adds down the panel, whatever the height of the tile. So a
row's result has the same bits alone and among many rows.

In a batched tile every row has a panel of its own, as every head has its own keys. Rows then share
no loads, but their chains still run in parallel, and several panels arrive from memory at once.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.formats import Format
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

TILE_ROWS = 6


def _make_tile(
    target: KernelTarget,
    panel_format: Format,
    rows: int,
    vectors: int,
    *,
    prefetch_lines: int,
    nontemporal: bool,
) -> Any:
    """Return tile: out[rows, columns] += inputs[rows, steps] @ panel[steps, columns].

    in_ptr, in_stride_bytes        input rows, and bytes from one to the next
    panel_ptr, panel_stride_bytes  the panel, and bytes from one step to the next
    steps                          number of steps
    out_ptr, out_stride_bytes      rows of accumulators, float32 or int32
    prefetch_ptr                   first cache line to prefetch

    The panel is `vectors` vectors wide. Every step prefetches the next `prefetch_lines` lines.
    """

    def tile(
        v: Vectors, in_ptr: Value, in_stride_bytes: Value, panel_ptr: Value,
        panel_stride_bytes: Value, steps: Value, out_ptr: Value, out_stride_bytes: Value,
        prefetch_ptr: Value,
    ) -> None:  # fmt: skip
        def prefetch(k: Value) -> None:
            for line in range(prefetch_lines):
                lines_ptr = prefetch_ptr + k * (prefetch_lines * LINE_BYTES)
                v.prefetch(lines_ptr, line * LINE_BYTES, nontemporal=nontemporal)

        _walk(
            v,
            panel_format,
            vectors,
            _row_pointers(v, in_ptr, in_stride_bytes, rows),
            [panel_ptr],
            panel_stride_bytes,
            steps,
            _row_pointers(v, out_ptr, out_stride_bytes, rows),
            prefetch,
        )

    return kernel(target, tile)


def _make_batched_tile(target: KernelTarget, panel_format: Format, rows: int, vectors: int) -> Any:
    """Return tile: out[r, columns] += inputs[r, steps] @ panels[r, steps, columns] of each row r.

    in_ptr, in_stride_bytes    input rows, and bytes from one to the next
    panel_ptr                  the first row's panel
    batch_stride_bytes         bytes from one row's panel to the next row's
    panel_stride_bytes, steps  bytes from one step to the next, and number of steps
    out_ptr, out_stride_bytes  rows of accumulators, float32
    prefetch_offset_bytes      bytes from the words being read to those to prefetch, or negative;
                               unused where the target does not prefetch_next_block
    """

    def tile(
        v: Vectors, in_ptr: Value, in_stride_bytes: Value, panel_ptr: Value,
        batch_stride_bytes: Value, panel_stride_bytes: Value, steps: Value, out_ptr: Value,
        out_stride_bytes: Value, prefetch_offset_bytes: Value,
    ) -> None:  # fmt: skip
        panel_ptrs = _row_pointers(v, panel_ptr, batch_stride_bytes, rows)

        def prefetch(k: Value) -> None:
            for row_panel_ptr in panel_ptrs if target.prefetch_next_block else ():
                next_ptr = row_panel_ptr + prefetch_offset_bytes
                step_ptr = next_ptr + k * panel_stride_bytes
                for offset_bytes in range(0, vectors * v.lanes * WORD_BYTES, LINE_BYTES):
                    v.prefetch(step_ptr, offset_bytes)

        _walk(
            v,
            panel_format,
            vectors,
            _row_pointers(v, in_ptr, in_stride_bytes, rows),
            panel_ptrs,
            panel_stride_bytes,
            steps,
            _row_pointers(v, out_ptr, out_stride_bytes, rows),
            prefetch,
        )

    return kernel(target, tile)


def _row_pointers(v: Vectors, base_ptr: Value, stride_bytes: Value, rows: int) -> list[Value]:
    return [base_ptr + stride_bytes * row for row in range(rows)]


def _walk(
    v: Vectors,
    panel_format: Format,
    vectors: int,
    in_ptrs: list[Value],
    panel_ptrs: list[Value],
    panel_stride_bytes: Value,
    steps: Value,
    out_ptrs: list[Value],
    prefetch: Callable[[Value], None],
) -> None:
    """Emit the loop of a tile; `prefetch(k)` emits the prefetches of step k.

    `panel_ptrs` has one panel for all rows, or one for each row.
    """
    load = v.load_words if panel_format.accumulates_int32 else v.load
    # The row of each accumulator, and its offset in the row. A batched tile loads its weights from
    # the same offsets in the panels, so there a row is also a panel.
    row_offsets = [
        (row, vector * v.lanes * WORD_BYTES)
        for row in range(len(in_ptrs))
        for vector in range(vectors)
    ]
    accumulators = [load(out_ptrs[row], offset_bytes) for row, offset_bytes in row_offsets]

    def step(k: Value, accumulators: list[Value]) -> list[Value]:
        prefetch(k)
        step_ptrs = [panel_ptr + k * panel_stride_bytes for panel_ptr in panel_ptrs]
        weights = {
            (panel, offset_bytes): panel_format.widen(
                v, v.load_words(step_ptrs[panel], offset_bytes)
            )
            for panel, offset_bytes in row_offsets
            if panel < len(panel_ptrs)
        }
        inputs = [
            panel_format.inputs(v, in_ptr + k * panel_format.input_bytes) for in_ptr in in_ptrs
        ]
        results = []
        for (row, offset_bytes), accumulator in zip(row_offsets, accumulators, strict=True):
            total = accumulator
            row_weights = weights[row % len(panel_ptrs), offset_bytes]
            for value, weight in zip(inputs[row], row_weights, strict=True):
                total = panel_format.multiply_add(v, value, weight, total)
            results.append(total)
        return results

    results = v.loop(steps, 1, accumulators, step)
    for (row, offset_bytes), total in zip(row_offsets, results, strict=True):
        v.store(total, out_ptrs[row], offset_bytes)


def make_tiles(
    target: KernelTarget,
    panel_format: Format,
    vectors: int,
    *,
    prefetch_lines: int,
    nontemporal: bool = False,
) -> Any:
    """Return tiles: out += inputs @ panel of any number of rows, in tiles of up to 6 rows.

    The arguments are those of a tile, with the number of rows before `prefetch_ptr`. Each tile
    continues to prefetch where the one before ended. Once as many bytes are prefetched as the panel
    has, the next tile begins at `prefetch_ptr` again.
    """
    tile1, tile2, tile3, tile4, tile5, tile6 = (
        _make_tile(
            target,
            panel_format,
            height,
            vectors,
            prefetch_lines=prefetch_lines,
            nontemporal=nontemporal,
        )
        for height in range(1, TILE_ROWS + 1)
    )

    @compiled
    def tiles(
        in_ptr: int, in_stride_bytes: int, panel_ptr: int, panel_stride_bytes: int, steps: int,
        out_ptr: int, out_stride_bytes: int, rows: int, prefetch_ptr: int,
    ) -> None:  # fmt: skip
        prefetched_bytes = 0
        while rows > 0:
            next_ptr = prefetch_ptr + prefetched_bytes
            # 7 and 8 rows are 4 + 3 and 4 + 4, not 6 + 1 and 6 + 2: a tile of one or two rows has
            # too few chains to hide the latency of a multiply-add.
            if rows >= 9 or rows == 6:
                height = 6
                tile6(
                    in_ptr, in_stride_bytes, panel_ptr, panel_stride_bytes, steps,
                    out_ptr, out_stride_bytes, next_ptr,
                )  # fmt: skip
            elif rows == 5:
                height = 5
                tile5(
                    in_ptr, in_stride_bytes, panel_ptr, panel_stride_bytes, steps,
                    out_ptr, out_stride_bytes, next_ptr,
                )  # fmt: skip
            elif rows >= 4:
                height = 4
                tile4(
                    in_ptr, in_stride_bytes, panel_ptr, panel_stride_bytes, steps,
                    out_ptr, out_stride_bytes, next_ptr,
                )  # fmt: skip
            elif rows == 3:
                height = 3
                tile3(
                    in_ptr, in_stride_bytes, panel_ptr, panel_stride_bytes, steps,
                    out_ptr, out_stride_bytes, next_ptr,
                )  # fmt: skip
            elif rows == 2:
                height = 2
                tile2(
                    in_ptr, in_stride_bytes, panel_ptr, panel_stride_bytes, steps,
                    out_ptr, out_stride_bytes, next_ptr,
                )  # fmt: skip
            else:
                height = 1
                tile1(
                    in_ptr, in_stride_bytes, panel_ptr, panel_stride_bytes, steps,
                    out_ptr, out_stride_bytes, next_ptr,
                )  # fmt: skip
            in_ptr += height * in_stride_bytes
            out_ptr += height * out_stride_bytes
            rows -= height
            prefetched_bytes += steps * prefetch_lines * LINE_BYTES
            if prefetched_bytes >= steps * panel_stride_bytes:
                prefetched_bytes = 0

    return tiles


def make_batched_tiles(target: KernelTarget, panel_format: Format, vectors: int) -> Any:
    """Return tiles: each of any number of rows times its own panel, in batched tiles of up to 3.

    The arguments are those of a batched tile, with the number of rows before
    `prefetch_offset_bytes`.
    """
    tile1, tile2, tile3 = (
        _make_batched_tile(target, panel_format, height, vectors) for height in (1, 2, 3)
    )

    @compiled
    def tiles(
        in_ptr: int, in_stride_bytes: int, panel_ptr: int, batch_stride_bytes: int,
        panel_stride_bytes: int, steps: int, out_ptr: int, out_stride_bytes: int, rows: int,
        prefetch_offset_bytes: int,
    ) -> None:  # fmt: skip
        while rows >= 3:
            tile3(
                in_ptr, in_stride_bytes, panel_ptr, batch_stride_bytes, panel_stride_bytes, steps,
                out_ptr, out_stride_bytes, prefetch_offset_bytes,
            )  # fmt: skip
            in_ptr += 3 * in_stride_bytes
            panel_ptr += 3 * batch_stride_bytes
            out_ptr += 3 * out_stride_bytes
            rows -= 3
        if rows == 2:
            tile2(
                in_ptr, in_stride_bytes, panel_ptr, batch_stride_bytes, panel_stride_bytes, steps,
                out_ptr, out_stride_bytes, prefetch_offset_bytes,
            )  # fmt: skip
        elif rows == 1:
            tile1(
                in_ptr, in_stride_bytes, panel_ptr, batch_stride_bytes, panel_stride_bytes, steps,
                out_ptr, out_stride_bytes, prefetch_offset_bytes,
            )  # fmt: skip

    return tiles
