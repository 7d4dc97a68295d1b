"""Heapsort of integers in place (Williams 1964): no scratch memory, O(n log n) for any input."""

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.scalar import store_int


@compiled
def _sift_down(heap: int, index: int, count: int) -> None:
    """Move element `index` of a min-heap below all smaller ones."""
    value = load_int(heap, index)
    while 2 * index + 1 < count:
        child = 2 * index + 1
        if child + 1 < count and load_int(heap, child + 1) < load_int(heap, child):
            child += 1
        if load_int(heap, child) >= value:
            break
        store_int(heap, index, load_int(heap, child))
        index = child
    store_int(heap, index, value)


@compiled
def sort_descending(values: int, count: int) -> None:
    """Sort `count` int64 at address `values` in descending order."""
    start, end = count // 2, count
    while end > 1:
        if start > 0:  # build the heap, from the middle down
            start -= 1
        else:  # move its smallest element to the end
            end -= 1
            smallest = load_int(values, 0)
            store_int(values, 0, load_int(values, end))
            store_int(values, end, smallest)
        _sift_down(values, start, end)
