"""The steps of the course."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.resources import files
from types import ModuleType

from nanovllm.errors import InvalidRequestError
from nanovllm.learn.checking import Case, Mistake

_SUBJECTS = re.compile(r"(`[\w.]+`(, )?)+(?=:\s)")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        number: from 1.
        module: name of the reader's module and of the step's package, such as "step03_layer_norm".
        title: what is written in it.
        minutes: how long it takes.
        real: code of the project that does the same, each as "module:name".
    """

    number: int
    module: str
    title: str
    minutes: int
    real: tuple[str, ...]

    @cached_property
    def solution(self) -> ModuleType:
        """The module of the solution."""
        return import_module(f"nanovllm.learn.steps.{self.module}.solution")

    @property
    def cases(self) -> tuple[Case, ...]:
        """What is checked, the simplest first."""
        return tuple(import_module(f"nanovllm.learn.steps.{self.module}.check").CASES)

    @property
    def mistakes(self) -> tuple[Mistake, ...]:
        """Mistakes that a check recognizes."""
        return tuple(import_module(f"nanovllm.learn.steps.{self.module}.check").MISTAKES)

    @property
    def hints(self) -> tuple[str, ...]:
        """What helps without telling everything, the smallest first.

        One that is about some functions begins with their names: "`encode`, `Cache.read`: ...".
        """
        parts = self.text("hints.md").split("\n---\n")
        return tuple(part.strip() for part in parts)

    def text(self, name: str) -> str:
        """Return a file of the step's package: page.md, hints.md or solution.py."""
        package = files(f"nanovllm.learn.steps.{self.module}")
        return package.joinpath(name).read_text(encoding="utf-8")


STEPS = (
    Step(1, "step01_tokens", "bytes, byte-pair encoding and a bigram", 60,
         ("nanovllm.engine.tokenizer:Tokenizer",)),
    Step(2, "step02_logits", "embedding, logits, softmax and cross-entropy", 40,
         ("nanovllm.model.families.gpt2.network:embed", "nanovllm.model.layers:logits",
          "nanovllm.model.logprobs:log_softmax")),
    Step(3, "step03_layer_norm", "layer normalization", 20, ("nanovllm.model.layers:layer_norm",)),
    Step(4, "step04_attention", "attention: one head, a causal mask, many heads", 80,
         ("nanovllm.model.attention:attention_scores", "nanovllm.model.attention:softmax",
          "nanovllm.model.families.gpt2.network:self_attention")),
    Step(5, "step05_forward", "a block and the whole forward pass", 60,
         ("nanovllm.model.families.forward:forward",
          "nanovllm.model.families.gpt2.network:feed_forward")),
    Step(6, "step06_sampling", "sampling: temperature, top-k, top-p", 50,
         ("nanovllm.model.numpy_sampler:apply_filters",
          "nanovllm.model.numpy_sampler:draw_token")),
    Step(7, "step07_kv_cache", "the KV cache", 60, ("nanovllm.model.kv_cache:KVCache",)),
    Step(8, "step08_blocks", "paged blocks, reference counts and prefix sharing", 90,
         ("nanovllm.engine.scheduling.block_manager:BlockManager",)),
    Step(9, "step09_scheduler", "continuous batching, chunked prefill and preemption", 90,
         ("nanovllm.engine.scheduling.scheduler:Scheduler",)),
    Step(10, "step10_streaming", "streaming text and stop strings", 45,
         ("nanovllm.engine.detokenizer:IncrementalDecoder",
          "nanovllm.engine.detokenizer:StopStrings")),
    Step(11, "step11_backward", "the backward pass, AdamW and a training loop", 90,
         ("nanovllm.training.network.numpy_operations:NumpyOperations",
          "nanovllm.training.network.optimizer:AdamW")),
    Step(12, "step12_fast", "making it fast: one matmul", 90,
         ("nanovllm.model.kernels.simd.tile:emit_tile",)),
)  # fmt: skip


def is_about(hint: str, functions: Iterable[str]) -> bool:
    """Return whether a hint begins with one of these functions; a class has all its methods."""
    subjects = _SUBJECTS.match(hint)
    return subjects is not None and any(
        f"{name}.".startswith(f"{function}.") or f"{function}.".startswith(f"{name}.")
        for name in re.findall(r"[\w.]+", subjects[0])
        for function in functions
    )


def step_of(number: int) -> Step:
    """Return a step. Raises InvalidRequestError where there is none of that number."""
    if not 1 <= number <= len(STEPS):
        raise InvalidRequestError(f"there is no step {number}; the steps are 1 to {len(STEPS)}")
    return STEPS[number - 1]
