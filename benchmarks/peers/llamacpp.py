"""llama.cpp by llama-cpp-python's C interface, with the slots of llama-server.

A variant names a GGUF file.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import serve

_SLOTS = 32
_CONTEXT = 512  # tokens a slot
_BATCH = 8192


class Slots:
    """Continuous batching: a free slot takes the next prompt, all others decode a token."""

    def __init__(self, library: Any, model: Any, slots: int, threads: int, log: Any) -> None:
        self._library = library
        self._log = log  # llama.cpp calls it as long as it runs
        self._slots = slots
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

    def generate(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Complete all prompts."""
        self._library.llama_memory_clear(self._memory, True)
        answers: list[list[int]] = [[] for _ in prompts]
        owners: list[int | None] = [None] * self._slots
        waiting = list(range(len(prompts)))
        while waiting or any(owner is not None for owner in owners):
            items: list[
                tuple[int, int, int, bool]
            ] = []  # token, position, slot, whether its logits are wanted
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
            self._decode(items)
            for slot, place in places.items():
                owner = owners[slot]
                assert owner is not None
                answers[owner].append(self._most_likely(place))
                if len(answers[owner]) == lengths[owner]:
                    self._library.llama_memory_seq_rm(self._memory, slot, -1, -1)
                    owners[slot] = None
        return answers

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> None:
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

    def _most_likely(self, place: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Create contexts for one and for many sequences over the variant's GGUF file."""
    import llama_cpp  # noqa: PLC0415 - tells that it is missing

    llama_cpp.llama_backend_init()
    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    file = model / f"{variant}.gguf"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; python -m benchmarks.peers.make_gguf {model} makes it"
        )
    loaded = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
    one, many = (
        Slots(llama_cpp, loaded, 1, threads, silence),
        Slots(llama_cpp, loaded, _SLOTS, threads, silence),
    )

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        return (one if len(prompts) == 1 else many).generate(prompts, lengths)

    return generate, {"versions": {"llama-cpp-python": llama_cpp.__version__}}


if __name__ == "__main__":
    serve(load)
