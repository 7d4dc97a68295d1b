"""The innermost loops: up to 6 rows times a panel, with all accumulators in registers.

A tile walks down a panel once, one step at a time:

                       panel   | w0 w1 w2 w3 |  <- one step: 4 vector loads, in memory order,
        6 input rows           | w0 w1 w2 w3 |     and 24 multiply-adds with 6 words of the inputs
                               |     ...     |

An accumulator is one chain of multiply-adds down the panel, whatever the height of the tile. So a
row's result has the same bits alone and among many rows.

In a batched tile every row has a panel of its own, as every head has its own keys. It still gains
something: its chains run in parallel, and several panels arrive from memory at once.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.formats import Format
from nanovllm.model.kernels.simd.vector import I64, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import WORD_BYTES

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
    """Return tile: out[rows, vectors] += inputs[rows, steps] @ panel[steps, vectors].

    in_ptr, in_stride_bytes        input rows
    panel_ptr, panel_stride_bytes  the panel, and bytes from one step to the next
    steps                          steps of the panel
    out_ptr, out_stride_bytes      accumulators
    prefetch_ptr                   every step prefetches the next `prefetch_lines` cache lines
    """

    def tile(
        v: Vectors, in_ptr: Value, in_stride_bytes: Value, panel_ptr: Value,
        panel_stride_bytes: Value, steps: Value, out_ptr: Value, out_stride_bytes: Value,
        prefetch_ptr: Value,
    ) -> None:  # fmt: skip
        def prefetch(k: Value) -> None:
            for line in range(prefetch_lines):
                lines_ptr = v.address(prefetch_ptr, v.times(k, prefetch_lines * LINE_BYTES))
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
    """Return tile: out[r, vectors] += inputs[r, steps] @ panels[r, steps, vectors] of each row r.

    in_ptr, in_stride_bytes    input rows
    panel_ptr                  the first row's panel
    batch_stride_bytes         bytes from one row's panel to the next row's
    panel_stride_bytes, steps  as those of a tile
    out_ptr, out_stride_bytes  accumulators
    prefetch_offset_bytes      words so far behind those being read are prefetched, where the
                               target profits from it
    """

    def tile(
        v: Vectors, in_ptr: Value, in_stride_bytes: Value, panel_ptr: Value,
        batch_stride_bytes: Value, panel_stride_bytes: Value, steps: Value, out_ptr: Value,
        out_stride_bytes: Value, prefetch_offset_bytes: Value,
    ) -> None:  # fmt: skip
        panel_ptrs = _row_pointers(v, panel_ptr, batch_stride_bytes, rows)

        def prefetch(k: Value) -> None:
            for row_panel_ptr in panel_ptrs if target.prefetch_next_block else ():
                next_ptr = v.address(row_panel_ptr, prefetch_offset_bytes)
                step_ptr = v.address(next_ptr, v.builder.mul(k, panel_stride_bytes))
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
    return [v.address(base_ptr, v.builder.mul(stride_bytes, I64(row))) for row in range(rows)]


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
    """Emit a tile, with one panel for all rows or one for each; `prefetch(k)` runs at step k."""
    load = v.load_words if panel_format.accumulates_int32 else v.load
    entries = [
        (row, vector * v.lanes * WORD_BYTES)
        for row in range(len(in_ptrs))
        for vector in range(vectors)
    ]
    accumulators = [load(out_ptrs[row], offset_bytes) for row, offset_bytes in entries]

    def step(k: Value, accumulators: list[Value]) -> list[Value]:
        prefetch(k)
        step_ptrs = [
            v.address(panel_ptr, v.builder.mul(k, panel_stride_bytes)) for panel_ptr in panel_ptrs
        ]
        weights = {
            (panel, offset_bytes): panel_format.widen(
                v, v.load_words(step_ptrs[panel], offset_bytes)
            )
            for panel, offset_bytes in entries
            if panel < len(panel_ptrs)
        }
        inputs = [
            panel_format.inputs(v, v.address(in_ptr, v.times(k, panel_format.input_bytes)))
            for in_ptr in in_ptrs
        ]
        results = []
        for (row, offset_bytes), accumulator in zip(entries, accumulators, strict=True):
            total = accumulator
            row_weights = weights[row % len(panel_ptrs), offset_bytes]
            for value, weight in zip(inputs[row], row_weights, strict=True):
                total = panel_format.multiply_add(v, value, weight, total)
            results.append(total)
        return results

    results = v.loop(steps, 1, accumulators, step)
    for (row, offset_bytes), total in zip(entries, results, strict=True):
        v.store(total, out_ptrs[row], offset_bytes)


def make_tiles(
    target: KernelTarget,
    panel_format: Format,
    vectors: int,
    *,
    prefetch_lines: int,
    nontemporal: bool = False,
) -> Any:
    """Return tiles: `rows` rows times one panel, in tiles of up to 6 rows.

    The arguments are those of a tile, with `rows` before `prefetch_ptr`. Each tile prefetches where
    the one before has stopped, until as many bytes are prefetched as the panel has.
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
    """Return tiles: each of `rows` rows times its own panel, in batched tiles of up to 3 rows.

    The arguments are those of a batched tile, with `rows` before `prefetch_offset_bytes`.
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
