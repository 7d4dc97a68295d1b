"""Heapsort of integers in place (Williams 1964): no memory of its own, and no order of the input makes it slow."""

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.simd.move import load_int
from nanovllm.model.kernels.simd.scalar import store_int


@compiled
def _sift_down(at: int, place: int, count: int) -> None:
    """Let the integer at `place` sink below all smaller ones: the heap's smallest is on top."""
    value = load_int(at, place)
    while 2 * place + 1 < count:
        child = 2 * place + 1
        if child + 1 < count and load_int(at, child + 1) < load_int(at, child):
            child += 1
        if load_int(at, child) >= value:
            break
        store_int(at, place, load_int(at, child))
        place = child
    store_int(at, place, value)


@compiled
def sort_descending(at: int, count: int) -> None:
    """Sort `count` 64-bit integers from address `at`, the largest first."""
    start, end = (
        count // 2,
        count,
    )  # first the heap grows downwards from the middle, then its top goes to the end, again and again
    while end > 1:
        if start > 0:
            start -= 1
        else:
            end -= 1
            smallest = load_int(at, 0)
            store_int(at, 0, load_int(at, end))
            store_int(at, end, smallest)
        _sift_down(at, start, end)
