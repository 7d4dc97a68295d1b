"""Single kernels as entries that tests call, kept in the user's cache as the library is.

Of several processes that need the same entries, one compiles them.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.codegen import Library, host_cpu
from nanovllm.model.kernels.build.compiler import compile_entries, compiled
from nanovllm.model.kernels.build.object_cache import ObjectCache, user_cache_folder
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES, KernelTarget, Spec
from nanovllm.model.kernels.forward.attention import make_paged_attention
from nanovllm.model.kernels.forward.attention_parts import make_softmax
from nanovllm.model.kernels.forward.convert import (
    make_pack_value_row,
    make_quantize_row,
    make_quantize_signed,
    make_round_row,
    make_widen_row,
)
from nanovllm.model.kernels.forward.epilogue import make_epilogue
from nanovllm.model.kernels.forward.head import (
    make_choose_best,
    make_clear_best,
    make_update_best,
)
from nanovllm.model.kernels.forward.kv_cache import make_store
from nanovllm.model.kernels.forward.layernorm import make_normalize_head, make_normalize_row
from nanovllm.model.kernels.forward.matmul import make_linear
from nanovllm.model.kernels.forward.prepare import prepare_attention
from nanovllm.model.kernels.forward.rotary import make_turn_head
from nanovllm.model.kernels.library import (
    COMPILED_IN,
    EntryPoints,
    cache_key,
    digest_of_sources,
)
from nanovllm.model.kernels.simd.memory import linear_at, load_int, step_record_at, store_int
from nanovllm.model.kernels.simd.rows import rows_at
from nanovllm.model.kernels.step_record import best_bytes

Entries = Mapping[str, Any]
_COMPILED_IN = (*COMPILED_IN, "tests.support.kernel_entries")


def row_kernels(target: KernelTarget) -> Callable[..., None]:
    """Return run(name, *integers), which calls one of the kernels for a row."""
    functions = _load(_row_entries, Spec(target)).functions

    def run(name: str, *values: int) -> None:
        array = np.array(values, dtype=np.int64)
        assert functions[name](array.ctypes.data, 0) == 0

    return run


def linear_kernel(target: KernelTarget, weights: str) -> Callable[[int, int], int]:
    """Return run(values_ptr, thread): the int64 values are the record and the arguments after it.

    They are record_ptr, rows, in_ptr, in_stride_bytes, out_ptr, out_stride_bytes and epilogue.
    """
    return _load(_linear_entries, Spec(target, weights)).functions["linear"]


def attention_kernel(spec: Spec) -> Callable[[int, int], int]:
    """Return run(record_ptr, thread): the operations between two linear layers."""
    return _load(_attention_entries, spec).functions["attention"]


def argmax_kernel(target: KernelTarget) -> Callable[[int, int], int]:
    """Return run(values_ptr, thread): the int64 values are the arguments, all threads' in turn.

    They are scores_ptr, rows, vocab, padded, threads, best_ptr and tokens_ptr.
    """
    return _load(_argmax_entries, Spec(target)).functions["argmax"]


@cache
def _load(make_entries: Callable[[Spec], Entries], spec: Spec) -> Library:
    entries = make_entries(spec)
    store, names = ObjectCache(user_cache_folder() / "test-kernels"), tuple(entries)
    if CHECKS_ADDRESSES:  # the code has an address of this process in it
        return Library(compile_entries(entries, host_cpu()), names)
    sources = digest_of_sources(_COMPILED_IN)
    key = cache_key(
        spec, host_cpu(), EntryPoints(make_entries.__name__, "tests", names, _COMPILED_IN, sources)
    )
    with store.exclusive(key):
        image = store.load(key)
        if image is None:
            image = compile_entries(entries, host_cpu())
            store.save(key, image)
    return Library(image, names)


def _row_entries(spec: Spec) -> Entries:
    target = spec.target
    epilogue = make_epilogue(target, "float32")

    @compiled
    def finish(values_ptr: int, _thread: int) -> None:
        kind, accumulators_ptr = load_int(values_ptr, 0), load_int(values_ptr, 1)
        linear, out_ptr = linear_at(load_int(values_ptr, 2)), load_int(values_ptr, 3)
        epilogue(kind, rows_at(accumulators_ptr, 0), 1, linear, 0, 0, rows_at(out_ptr, 0))

    return {
        "finish": finish,
        "normalize_row": _taking(7, make_normalize_row(target)),
        "normalize_head": _taking(4, make_normalize_head(target)),
        "turn_head": _taking(3, make_turn_head(target)),
        "quantize_row": _taking(5, make_quantize_row(target)),
        "quantize_signed": _taking(4, make_quantize_signed(target)),
        "round_row": _taking(3, make_round_row(target)),
        "widen_row": _taking(3, make_widen_row(target)),
        "softmax": _taking(8, make_softmax(target, as_bfloat16=False)),
        "softmax_to_bfloat16": _taking(8, make_softmax(target, as_bfloat16=True)),
        **{
            f"pack_value_row_{per_word}": _taking(4, make_pack_value_row(target, per_word))
            for per_word in (1, 2, 4)
        },
    }


def _linear_entries(spec: Spec) -> Entries:
    linear_layer = make_linear(spec.target, spec.weights)

    @compiled
    def linear(values_ptr: int, thread: int) -> None:
        record = step_record_at(load_int(values_ptr, 0))
        rows, in_ptr = load_int(values_ptr, 1), load_int(values_ptr, 2)
        in_stride_bytes, out_ptr = load_int(values_ptr, 3), load_int(values_ptr, 4)
        out_stride_bytes, epilogue = load_int(values_ptr, 5), load_int(values_ptr, 6)
        inputs, out = rows_at(in_ptr, in_stride_bytes), rows_at(out_ptr, out_stride_bytes)
        linear_layer(record, thread, record.phases_ptr, 0, rows, inputs, out, epilogue)

    return {"linear": linear}


def _attention_entries(spec: Spec) -> Entries:
    store_keys_and_values, paged_attention = make_store(spec), make_paged_attention(spec)

    @compiled
    def attention(record_ptr: int, thread: int) -> None:
        prepare_attention(record_ptr, thread)
        record = step_record_at(record_ptr)
        phase = store_keys_and_values(record, thread, record.phases_ptr, 0)
        paged_attention(record, thread, phase, 0)

    return {"attention": attention}


def _argmax_entries(spec: Spec) -> Entries:
    target = spec.target
    clear_best, update_best = make_clear_best(target), make_update_best(target)
    choose_best = make_choose_best(target)
    row_bytes, width = best_bytes(target.lanes), 4 * target.lanes

    @compiled
    def argmax(values_ptr: int, _thread: int) -> None:
        scores_ptr, rows = load_int(values_ptr, 0), load_int(values_ptr, 1)
        vocab, padded = load_int(values_ptr, 2), load_int(values_ptr, 3)
        threads, best_ptr = load_int(values_ptr, 4), load_int(values_ptr, 5)
        tokens_ptr = load_int(values_ptr, 6)
        for thread in range(threads):
            clear_best(best_ptr + thread * rows * row_bytes, rows)
        for panel in range(padded // width):
            for row in range(rows):
                row_best = best_ptr + (panel % threads * rows + row) * row_bytes
                panel_scores = scores_ptr + (row * padded + panel * width) * 4
                update_best(panel_scores, width, panel * width, vocab, row_best)
        for row in range(rows):
            token = choose_best(best_ptr + row * row_bytes, threads, rows * row_bytes)
            store_int(tokens_ptr, row, token)

    return {"argmax": argmax}


def _taking(count: int, kernel: Any) -> Any:
    """Return an entry that calls a kernel with the first `count` int64 at an address."""

    def three(p: int, _thread: int) -> None:
        kernel(load_int(p, 0), load_int(p, 1), load_int(p, 2))

    def four(p: int, _thread: int) -> None:
        kernel(load_int(p, 0), load_int(p, 1), load_int(p, 2), load_int(p, 3))

    def five(p: int, _thread: int) -> None:
        kernel(load_int(p, 0), load_int(p, 1), load_int(p, 2), load_int(p, 3), load_int(p, 4))

    def seven(p: int, _thread: int) -> None:
        kernel(
            load_int(p, 0), load_int(p, 1), load_int(p, 2), load_int(p, 3), load_int(p, 4),
            load_int(p, 5), load_int(p, 6),
        )  # fmt: skip

    def eight(p: int, _thread: int) -> None:
        kernel(
            load_int(p, 0), load_int(p, 1), load_int(p, 2), load_int(p, 3), load_int(p, 4),
            load_int(p, 5), load_int(p, 6), load_int(p, 7),
        )  # fmt: skip

    return compiled({3: three, 4: four, 5: five, 7: seven, 8: eight}[count])
