"""llama.cpp by llama-cpp-python's C interface, with the slots of llama-server.

A variant names a GGUF file.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import serve

_SLOTS = 32
_CONTEXT = 512  # tokens a slot
_BATCH = 8192


Item = tuple[int, int, int, bool]
"""A token, its position, its slot, and whether its logits are wanted."""


class Context:
    """A llama_context over a model, whose cache has room for a number of slots."""

    def __init__(self, library: Any, model: Any, slots: int, threads: int) -> None:
        self._library = library
        params = library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            _CONTEXT * slots + _CONTEXT,
            _BATCH,
            512,
            slots,
        )
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = library.llama_init_from_model(model, params)
        self._memory = library.llama_get_memory(self._context)
        self._vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    def clear(self) -> None:
        """Empty the cache."""
        self._library.llama_memory_clear(self._memory, True)

    def cut(self, slot: int, position: int) -> None:
        """Remove a slot's tokens from a position on from the cache."""
        self._library.llama_memory_seq_rm(self._memory, slot, position, -1)

    def decode(self, items: list[Item]) -> None:
        """Compute tokens."""
        batch = self._library.llama_batch_init(len(items), 0, 1)
        batch.n_tokens = len(items)
        for index, (token, position, slot, is_wanted) in enumerate(items):
            batch.token[index], batch.pos[index], batch.n_seq_id[index], batch.logits[index] = (
                token,
                position,
                1,
                is_wanted,
            )
            batch.seq_id[index][0] = slot
        assert self._library.llama_decode(self._context, batch) == 0
        self._library.llama_batch_free(batch)

    def logits(self, place: int) -> Any:
        """Return the logits of the item at an index of the last batch, valid until the next."""
        logits = self._library.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(logits, (self._vocab,))


class Slots:
    """Continuous batching: a free slot takes the next prompt, all others decode a token."""

    def __init__(self, context: Context, slots: int) -> None:
        self._context = context
        self._slots = slots

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Complete all prompts."""
        self._context.clear()
        answers: list[list[int]] = [[] for _ in prompts]
        owners: list[int | None] = [None] * self._slots
        waiting = list(range(len(prompts)))
        while waiting or any(owner is not None for owner in owners):
            items: list[Item] = []
            places = {}
            for slot in range(self._slots):
                owner = owners[slot]
                if owner is None and waiting:
                    owners[slot] = owner = waiting.pop(0)
                if owner is None:
                    continue
                prompt, answer = prompts[owner], answers[owner]
                if answer:
                    items.append((answer[-1], len(prompt) + len(answer) - 1, slot, True))
                else:
                    items += [
                        (token, position, slot, position == len(prompt) - 1)
                        for position, token in enumerate(prompt)
                    ]
                places[slot] = len(items) - 1
            self._context.decode(items)
            for slot, place in places.items():
                owner = owners[slot]
                assert owner is not None
                answers[owner].append(int(self._context.logits(place).argmax()))
                if len(answers[owner]) == lengths[owner]:
                    self._context.cut(slot, 0)
                    owners[slot] = None
        return answers


def open_library() -> Any:
    """Import llama_cpp, and silence its log."""
    import llama_cpp  # noqa: PLC0415 - tells that it is missing

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silence(llama_cpp), ctypes.c_void_p(0))
    return llama_cpp


@cache
def _silence(library: Any) -> Any:
    """Return a log callback, which is kept because llama.cpp calls it as long as it runs."""
    return library.llama_log_callback(lambda *_: None)


def open_model(library: Any, file: Path) -> Any:
    """Load a GGUF file."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; python -m benchmarks.peers.make_gguf {file.parent} makes it"
        )
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    return library.llama_model_load_from_file(str(file).encode(), params)


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Create contexts for one and for many sequences over the variant's GGUF file."""
    library = open_library()
    loaded = open_model(library, model / f"{variant}.gguf")
    one, many = (Slots(Context(library, loaded, n, threads), n) for n in (1, _SLOTS))

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return (one if len(prompts) == 1 else many).generate(prompts, lengths)

    return generate, {"versions": {"llama-cpp-python": library.__version__}}


if __name__ == "__main__":
    serve(load)
