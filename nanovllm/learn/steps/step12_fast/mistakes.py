"""What goes wrong in step 12."""

from nanovllm.learn.checking import Mistake

_ZEROS = "    out = np.zeros((rows.shape[0], weight.shape[1]), dtype=np.float32)\n"
_EMPTY = "    out = np.empty((len(rows), len(columns)), dtype=np.float32)\n"
_PLAIN_END = '        [tokens, d_out], float32.\n    """\n' + _ZEROS
_LOOPS = """    for i in range(rows.shape[0]):
        for j in range(weight.shape[1]):
            for k in range(rows.shape[1]):
                out[i, j] += rows[i, k] * weight[k, j]
"""
_PLAIN = _PLAIN_END + _LOOPS
_REORDERED_END = 'one instruction.\n    """\n' + _ZEROS
_REORDERED = """        for k in range(rows.shape[1]):
            for j in range(weight.shape[1]):
"""
_TILED = '''float32.
    """
    out = np.empty((len(rows), len(columns)), dtype=np.float32)
    for j in range(0, len(columns), TILE_COLUMNS):
        for i in range(0, len(rows), TILE_ROWS):
'''
_PARALLEL_END = 'begins at column 4 n.\n    """\n'
_PARALLEL = "    for tile in numba.prange((len(columns) + TILE_COLUMNS - 1) // TILE_COLUMNS):\n"
_TILE_ROWS = """        for i in range(0, len(rows), TILE_ROWS):
            multiply_tile(rows, columns, out, i, """

MISTAKES = (
    Mistake(
        "weight transposed",
        "The weight is read as [d_out, d_in]; element k of column j is weight[k, j].",
        _PLAIN,
        _PLAIN.replace("weight[k, j]", "weight[j, k]"),
    ),
    Mistake(
        "last product only",
        "Each element is the last product alone: add them up with +=.",
        _PLAIN,
        _PLAIN.replace("+=", "="),
    ),
    Mistake(
        "float64 result",
        "The result is float64, the type of np.zeros without a dtype. It has twice the bytes, and "
        "half as many elements fit into an instruction.",
        _PLAIN_END,
        _PLAIN_END.replace(", dtype=np.float32", ""),
    ),
    Mistake(
        "order of the loops kept",
        "The inner loop still runs over k, down a column of the weight: each step reads another "
        "cache line. The order is i, k, j.",
        _REORDERED,
        """        for j in range(weight.shape[1]):
            for k in range(rows.shape[1]):
""",
    ),
    Mistake(
        "memory not set to zero",
        "np.empty gives memory with whatever was in it, and the sums are added to that. Begin with "
        "np.zeros.",
        _REORDERED_END,
        _REORDERED_END.replace("np.zeros", "np.empty"),
    ),
    Mistake(
        "transposed view",
        "weight.T is a view: the elements stay where they are in memory. Copy them, by "
        "np.ascontiguousarray.",
        "return np.ascontiguousarray(weight.T)",
        "return weight.T",
    ),
    Mistake(
        "reshaped instead of transposed",
        "reshape keeps the order of the elements in memory, so rows and columns are mixed up.",
        "return np.ascontiguousarray(weight.T)",
        "return weight.reshape(weight.shape[1], weight.shape[0])",
    ),
    Mistake(
        "tile over the edge",
        "Row i + 1 is used although i was the last one. Python raises an IndexError; compiled code "
        "reads and changes memory of something else.",
        "i1, last = min(i + 1, len(rows) - 1),",
        "i1, last = i + 1,",
    ),
    Mistake(
        "negative last column",
        "Columns beyond the edge become column -1, and so are written over whatever is there.",
        "j1, j2, j3 = min(j + 1, last), min(j + 2, last), min(j + 3, last)",
        "j1, j2, j3 = [n if n <= last else -1 - last for n in (j + 1, j + 2, j + 3)]",
    ),
    Mistake(
        "one sum of a wrong column",
        "One of the eight sums multiplies the wrong column: s11 is row i + 1 and column j + 1.",
        "s11 += a1[k] * b1[k]",
        "s11 += a1[k] * b0[k]",
    ),
    Mistake(
        "tile added to the result",
        "The tile is added to `out`, which np.empty has not set to zero. Its sums are complete: "
        "assign them.",
        "    out[i, j], out[i, j1], out[i, j2], out[i, j3] = s00, s01, s02, s03\n",
        "    out[i, j1], out[i, j2], out[i, j3] = s01, s02, s03\n    out[i, j] += s00\n",
    ),
    Mistake(
        "edge tile of columns dropped",
        "The last columns are missing where 4 does not divide their number: the loop ends before "
        "the incomplete tile.",
        _TILED,
        _TILED.replace("range(0, len(columns),", "range(0, len(columns) - TILE_COLUMNS + 1,"),
    ),
    Mistake(
        "edge tile of rows dropped",
        "The last rows are missing where 2 does not divide their number, and with one token all "
        "are missing.",
        _TILED,
        _TILED.replace("range(0, len(rows),", "range(0, len(rows) - TILE_ROWS + 1,"),
    ),
    Mistake(
        "no prange",
        "The outer loop is a plain range, so one thread does everything: use numba.prange.",
        "numba.prange(",
        "range(",
    ),
    Mistake(
        "prange with a step",
        "prange has a step, and Numba's counts by ones only. Let it count the tiles; tile number n "
        "begins at column 4 n.",
        _PARALLEL + _TILE_ROWS + "tile * TILE_COLUMNS)",
        "    for j in numba.prange(0, len(columns), TILE_COLUMNS):\n" + _TILE_ROWS + "j)",
    ),
    Mistake(
        "race over k",
        "The loop over k is shared between threads, so two of them add to the same element at the "
        "same time, and one sum is lost: a race. Share a loop whose iterations write different "
        "elements.",
        _PARALLEL_END + _EMPTY + _PARALLEL,
        _PARALLEL_END + _EMPTY + "    out[:] = 0\n"
        "    for k in numba.prange(rows.shape[1]):\n"
        "        for i in range(len(rows)):\n"
        "            out[i] += rows[i, k] * columns[:, k]\n"
        "    for tile in range(0):\n",
    ),
    Mistake(
        "tiles overlap",
        "The tile's number is used as its column: tile 1 begins at column 4. Neighbours overlap, "
        "and the last columns are missing.",
        "multiply_tile(rows, columns, out, i, tile * TILE_COLUMNS)",
        "multiply_tile(rows, columns, out, i, tile)",
    ),
    Mistake(
        "number of tiles rounded down",
        "The number of tiles is rounded down, so the incomplete tile at the edge is missing.",
        _PARALLEL,
        "    for tile in numba.prange(len(columns) // TILE_COLUMNS):\n",
    ),
    Mistake(
        "tile not compiled",
        "multiply_tile runs in Python: its decorator is missing. Compiled code calls nothing but "
        "compiled code.",
        "@numba.njit(fastmath=True)\ndef multiply_tile(",
        "def multiply_tile(",
    ),
    Mistake(
        "sums in an order that is fixed",
        "The compiled loop adds one product at a time: without fastmath=True the compiler must "
        "keep the order of the additions, because another one rounds differently. With it, each "
        "sum becomes a vector of partial sums.",
        "@numba.njit(fastmath=True)\ndef multiply_tile(",
        "@numba.njit\ndef multiply_tile(",
    ),
    Mistake(
        "sums in float64",
        "The sums are float64, the type of 0.0, so every element is converted and half as many fit "
        "into an instruction. Begin with np.float32(0).",
        "    s00 = s01 = s02 = s03 = np.float32(0)\n    s10 = s11 = s12 = s13 = np.float32(0)\n",
        "    s00 = s01 = s02 = s03 = 0.0\n    s10 = s11 = s12 = s13 = 0.0\n",
    ),
    Mistake(
        "not compiled",
        "matmul_numba runs in Python: @numba.njit is missing above it.",
        "@numba.njit\ndef matmul_numba(",
        "def matmul_numba(",
    ),
)
