"""Training in nanovllm, without data files and evaluations. benchmarks/training.py runs it.

Options: {"backend": "numpy"} for the readable operations.
"""

import time
from typing import Any

import numpy as np

import nanovllm
from benchmarks.training_worker import (
    BETAS,
    GRAD_CLIP,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Setting,
    Step,
    serve,
)
from nanovllm.model.checkpoint import expected_shapes
from nanovllm.model.config import ModelConfig
from nanovllm.training.network.model import batch_loss
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import Operations
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.parameters import Parameters, initialize


def load(
    setting: Setting, options: dict[str, Any], threads: int, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Return a function that takes a step."""
    operations = make_operations(options.get("backend", "numba"), threads)
    about = {"versions": {"nanovllm": nanovllm.__version__}}
    parameters = config_of(setting).num_parameters
    return make_step(setting, operations, seed), {**about, "parameters": parameters}


def make_step(setting: Setting, operations: Operations, seed: int) -> Step:
    """Return a function that takes a step of a new network; see training_worker.Step."""
    config = config_of(setting)
    parameters = Parameters(expected_shapes(config))
    initialize(parameters, config, seed)
    optimizer = AdamW(
        parameters,
        operations,
        weight_decay=WEIGHT_DECAY,
        grad_clip=GRAD_CLIP,
        beta1=BETAS[0],
        beta2=BETAS[1],
    )
    generator = np.random.default_rng(seed)

    def step() -> tuple[float, float]:
        shape = (setting.batch, setting.context + 1)
        tokens = generator.integers(setting.vocab, size=shape)
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        started_s = time.perf_counter()
        scale = 1.0 / setting.tokens
        loss = batch_loss(operations, config, parameters, inputs, targets, scale=scale)
        optimizer.update(LEARNING_RATE)
        return time.perf_counter() - started_s, loss * scale

    return step


def config_of(setting: Setting) -> ModelConfig:
    """Return the network of a setting."""
    return ModelConfig(
        vocab=setting.vocab,
        max_positions=setting.context,
        d_model=setting.width,
        layers=setting.layers,
        heads=setting.heads,
        d_ff=4 * setting.width,
    )


def make_operations(backend: str, threads: int) -> Operations:
    """Return the operations of a backend; the first compiled ones on a machine take a minute."""
    if backend == "numpy":
        return NumpyOperations()
    from nanovllm.training.kernels.operations import (  # noqa: PLC0415 - loads the compiler
        CompiledOperations,
    )

    return CompiledOperations(threads)


if __name__ == "__main__":
    serve(load)
