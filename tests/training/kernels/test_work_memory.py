"""Working memory: parts that do not overlap, in one block that grows to what an operation needs."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.training.kernels.work_memory import WorkMemory

OPERATIONS = st.lists(st.lists(st.integers(0, 500), max_size=6), max_size=8)


@given(OPERATIONS)
def test_parts_are_aligned_apart_and_as_large_as_asked(operations: list[list[int]]) -> None:
    memory = WorkMemory()
    for counts in operations:
        memory.clear()
        parts = [memory.take(count) for count in counts]
        for number, (count, part) in enumerate(zip(counts, parts, strict=True)):
            assert part.address % LINE_BYTES == 0
            assert part.array.size == count
            assert count == 0 or part.array.ctypes.data == part.address
            part.array[:] = number
        for number, part in enumerate(parts):
            assert (part.array == number).all()
        ends = sorted((part.address, part.address + part.array.nbytes) for part in parts)
        for (_, end), (start, _) in pairwise(ends):
            assert end + LINE_BYTES <= start  # so that an access beyond a part is seen


def test_the_block_grows_to_the_largest_operation() -> None:
    memory = WorkMemory()
    memory.take(100)
    memory.take(1000)
    memory.clear()
    size_bytes = memory.size_bytes
    first, second = memory.take(100), memory.take(1000)
    assert first.block is second.block
    memory.clear()
    memory.take(10)
    memory.clear()
    assert memory.size_bytes == size_bytes >= 4 * 1100


def test_parts_of_a_block_that_has_grown_stay_valid() -> None:
    memory = WorkMemory()
    part = memory.take(10)
    part.array[:] = 7
    memory.clear()
    memory.take(1000)
    assert (part.array == 7).all()
