"""Step 12: one matmul, from plain loops to most of what the machine can do.

Numba compiles a function with the decorator `njit` to machine code at its first call. The tiles are
those of Goto and van de Geijn 2008 (https://doi.org/10.1145/1356052.1356053).
"""

import time
from collections.abc import Callable

import numba
import numpy as np
from threadpoolctl import ThreadpoolController

TILE_ROWS, TILE_COLUMNS = 2, 4


def matmul_plain(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return rows @ weight by three Python loops: each element is a sum over d_in.

    Args:
        rows: [tokens, d_in], float32.
        weight: [d_in, d_out], float32.

    Returns:
        [tokens, d_out], float32.
    """
    out = np.zeros((rows.shape[0], weight.shape[1]), dtype=np.float32)
    for i in range(rows.shape[0]):
        for j in range(weight.shape[1]):
            for k in range(rows.shape[1]):
                out[i, j] += rows[i, k] * weight[k, j]
    return out


@numba.njit
def matmul_numba(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the same by the same loops, compiled."""
    out = np.zeros((rows.shape[0], weight.shape[1]), dtype=np.float32)
    for i in range(rows.shape[0]):
        for j in range(weight.shape[1]):
            for k in range(rows.shape[1]):
                out[i, j] += rows[i, k] * weight[k, j]
    return out


@numba.njit
def matmul_reordered(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the same by loops in the order i, k, j: the inner one runs along rows of the memory.

    Neighbours in a row of `weight` and of the result are neighbours in memory, so the processor
    reads whole cache lines and computes several columns by one instruction.
    """
    out = np.zeros((rows.shape[0], weight.shape[1]), dtype=np.float32)
    for i in range(rows.shape[0]):
        for k in range(rows.shape[1]):
            for j in range(weight.shape[1]):
                out[i, j] += rows[i, k] * weight[k, j]
    return out


def pack(weight: np.ndarray) -> np.ndarray:
    """Return the weight's columns as rows that are contiguous in memory: [d_out, d_in].

    A server packs each weight once, when it loads the model.
    """
    return np.ascontiguousarray(weight.T)


@numba.njit(fastmath=True)
def multiply_tile(rows: np.ndarray, columns: np.ndarray, out: np.ndarray, i: int, j: int) -> None:
    """Compute out[i : i + 2, j : j + 4], a tile of 2 rows and 4 columns.

    Keep its 8 sums in 8 local variables: they stay in registers, and each element that is read
    serves 2 or 4 of them. At the edge of `out` let indices beyond the last row or column be those
    of the last one, so it is computed several times.

    Args:
        rows: [tokens, d_in].
        columns: packed weight, [d_out, d_in].
        out: the result, [tokens, d_out]; nothing outside the tile is changed.
        i: first row of the tile.
        j: first column of the tile.
    """
    i1, last = min(i + 1, len(rows) - 1), len(columns) - 1
    j1, j2, j3 = min(j + 1, last), min(j + 2, last), min(j + 3, last)
    a0, a1 = rows[i], rows[i1]
    b0, b1, b2, b3 = columns[j], columns[j1], columns[j2], columns[j3]
    s00 = s01 = s02 = s03 = np.float32(0)
    s10 = s11 = s12 = s13 = np.float32(0)
    for k in range(rows.shape[1]):
        s00 += a0[k] * b0[k]
        s01 += a0[k] * b1[k]
        s02 += a0[k] * b2[k]
        s03 += a0[k] * b3[k]
        s10 += a1[k] * b0[k]
        s11 += a1[k] * b1[k]
        s12 += a1[k] * b2[k]
        s13 += a1[k] * b3[k]
    out[i, j], out[i, j1], out[i, j2], out[i, j3] = s00, s01, s02, s03
    out[i1, j], out[i1, j1], out[i1, j2], out[i1, j3] = s10, s11, s12, s13


@numba.njit
def matmul_tiled(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return rows @ columns^T, tile by tile.

    The outer loop runs over the columns: 4 of them stay in the cache while all rows pass.

    Args:
        rows: [tokens, d_in], float32.
        columns: packed weight, [d_out, d_in], float32.

    Returns:
        [tokens, d_out], float32.
    """
    out = np.empty((len(rows), len(columns)), dtype=np.float32)
    for j in range(0, len(columns), TILE_COLUMNS):
        for i in range(0, len(rows), TILE_ROWS):
            multiply_tile(rows, columns, out, i, j)
    return out


@numba.njit(parallel=True)
def matmul_parallel(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the same; threads share the outer loop, by `numba.prange`.

    `prange(count)` is a `range(count)` whose iterations run in several threads. It counts by ones:
    let it count tiles, of which number n begins at column 4 n.
    """
    out = np.empty((len(rows), len(columns)), dtype=np.float32)
    for tile in numba.prange((len(columns) + TILE_COLUMNS - 1) // TILE_COLUMNS):
        for i in range(0, len(rows), TILE_ROWS):
            multiply_tile(rows, columns, out, i, tile * TILE_COLUMNS)
    return out


def measure(tokens: int, num_weights: int = 1, seconds: float = 1.0) -> dict[str, float]:  # given
    """Return the multiplications and additions a second of each version, in 10^9.

    The versions take turns, so that other programs slow down all of them alike; the best turn
    counts. The first two compute a part of the work only. All but "parallel" use one thread.

    Args:
        tokens: rows, 1 for decoding.
        num_weights: different weights, used in turn: more than the caches hold, as in a model.
        seconds: time for each version.
    """
    random = np.random.default_rng(0)
    rows = random.random((tokens, 768), dtype=np.float32)
    weights = [random.random((768, 3072), dtype=np.float32) for _ in range(num_weights)]
    packed = [pack(weight) for weight in weights]
    versions: dict[str, Callable[[], object]] = {
        "plain": lambda: matmul_plain(rows[:1], weights[0][:, :8]),
        "numba": lambda: matmul_numba(rows[:1], weights[0]),
        "reordered": lambda: [matmul_reordered(rows, weight) for weight in weights],
        "tiled": lambda: [matmul_tiled(rows, columns) for columns in packed],
        "parallel": lambda: [matmul_parallel(rows, columns) for columns in packed],
        "@": lambda: [rows @ weight for weight in weights],
    }
    best_s = dict.fromkeys(versions, float("inf"))
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        for version in versions.values():
            version()  # compiles
        end_s = time.perf_counter() + seconds * len(versions)
        while time.perf_counter() < end_s:
            for name, version in versions.items():
                start_s = time.perf_counter()
                version()
                best_s[name] = min(best_s[name], time.perf_counter() - start_s)
    work = dict.fromkeys(versions, 2e-9 * tokens * 768 * 3072 * num_weights)
    work |= {"plain": 2e-9 * 768 * 8, "numba": 2e-9 * 768 * 3072}
    return {name: work[name] / best_s[name] for name in versions}


def print_table() -> None:  # given
    """Print what `measure` finds for a prompt of 192 tokens, and for one token."""
    print("192 tokens: 10^9 operations a second. 1 token: 10^9 bytes of weights a second.")
    prompt, one = measure(192), measure(1, num_weights=32)
    for name in prompt:
        print(f"{name:12}{prompt[name]:12.3f}{2 * one[name]:12.3f}")


if __name__ == "__main__":
    print_table()
