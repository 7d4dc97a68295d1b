"""TrainableModel: a network with its gradients and optimizer, for a training loop of one's own.

for step in range(steps):
    loss = model.backward(token_ids)            gradients add up in model.gradients
    norm = optimizer.update(learning rate)      clip, AdamW, zero the gradients
model.save("folder")                            a checkpoint that LLM and transformers load
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from nanovllm.errors import TrainingError
from nanovllm.hub import resolve_model
from nanovllm.model.config import ModelConfig
from nanovllm.training.config import wrong_values
from nanovllm.training.data.tokenizer import load_tokenizer
from nanovllm.training.network.model import batch_loss
from nanovllm.training.network.operations import IGNORED, Operations, TokenIds
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.parameters import Parameters
from nanovllm.training.run.checkpoint import save_weights
from nanovllm.training.setup import (
    load_parameters,
    load_trainable,
    make_operations,
    save_model_files,
)


class TrainableModel:
    """A GPT-2 network in float32 whose parameters and gradients are NumPy arrays.

    >>> model = TrainableModel.load("tiny-books")
    >>> loss = model.backward([[5, 6, 7, 8]])
    >>> model.gradients["h.0.ln_1.bias"].shape
    (192,)

    For one thread at a time. As a context manager it ends its threads.

    Attributes:
        config: sizes of the network.
        weights: the parameters by name: views that may be read and written, never replaced.
        gradients: of the same names and shapes; a constant position embedding has none.
    """

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        operations: Operations,
        save_files: Callable[[Path], None],
    ) -> None:
        """Take the parts of a network; `load` and `Trainer.model` have them.

        `save_files` writes the files of a checkpoint apart from the weights.
        """
        self.config = config
        self.weights = parameters.arrays()
        self.gradients = parameters.views(parameters.gradients)
        self._parameters, self._operations, self._save_files = parameters, operations, save_files

    @classmethod
    def load(
        cls, model: str | Path, *, backend: str = "numba", num_threads: int | None = None
    ) -> Self:
        """Load a model by folder or name, as `LLM` does.

        Args:
            model: a folder, or a name such as "gpt2".
            backend: "numba" for compiled kernels, "numpy" for the readable operations.
            num_threads: threads of the kernels; the default is all usable physical cores.

        Raises:
            CheckpointError: the folder holds no GPT-2 checkpoint.
            ModelNotFoundError: there is no model of that name.
            TrainingError: another backend, or less than a thread.
        """
        _check_settings(backend=backend, num_threads=num_threads)
        folder = Path(resolve_model(str(model)))
        config = load_trainable(folder)
        operations = make_operations(backend, num_threads)
        save_files = partial(_save_copies, folder, config)
        return cls(config, load_parameters(config, folder), operations, save_files)

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self.close()

    def close(self) -> None:
        """End the threads of the compiled kernels."""
        self._operations.close()

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return self.config.num_parameters

    def loss(self, token_ids: ArrayLike, targets: ArrayLike | None = None) -> float:
        """Return the mean loss of a batch, in nats per target; 0 if all targets are ignored.

        Args:
            token_ids: integers [batch, context].
            targets: the token after each of `token_ids`, or -1 to ignore the prediction. Without
                it, all but the last token of each row predict all but the first.

        Raises:
            TrainingError: the arrays have other shapes or types, the context is longer than the
                model's, or a token is not in its vocabulary.
        """
        return self._mean(*self._checked(token_ids, targets), None)

    def backward(
        self, token_ids: ArrayLike, targets: ArrayLike | None = None, *, scale: float = 1.0
    ) -> float:
        """Return the mean loss of a batch, and add the gradients of `scale` times it.

        The gradients of several batches add up, for example those of 4 batches with a scale of 1/4.
        Arguments and errors are those of `loss`.
        """
        return self._mean(*self._checked(token_ids, targets), scale)

    def optimizer(
        self,
        *,
        weight_decay: float = 0.1,
        grad_clip: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
    ) -> AdamW:
        """Return an AdamW of the parameters, whose `update(learning_rate)` applies the gradients.

        `update` sets the gradients to 0 and returns their norm before clipping. Where the norm is
        not finite, it changes nothing.

        Args:
            weight_decay: of matrices; biases, gains and positions have none.
            grad_clip: largest norm of all gradients together, 0 for any.
            beta1, beta2, epsilon: of AdamW.

        Raises:
            TrainingError: an argument is out of its range. So does `update` for a learning rate
                that is negative or not finite.
        """
        _check_settings(weight_decay=weight_decay, grad_clip=grad_clip, beta1=beta1, beta2=beta2)
        if not 0 < epsilon < math.inf:
            raise TrainingError(f"epsilon is {epsilon!r} but must be a number, above 0")
        return AdamW(
            self._parameters,
            self._operations,
            weight_decay=weight_decay,
            grad_clip=grad_clip,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
        )

    def zero_gradients(self) -> None:
        """Set all gradients to 0, which `AdamW.update` does too."""
        self._parameters.gradients.fill(0.0)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint, with the tokenizer, in Hugging Face form; it replaces files there.

        Raises:
            TrainingError: a weight is not finite, a file cannot be written, or the model has no
                tokenizer.
        """
        for name, array in self.weights.items():
            if not np.isfinite(array).all():
                raise TrainingError(
                    f"{name} has a value that is not finite, so nothing is saved; load the model "
                    "again, and lower the learning rate"
                )
        self._save_files(Path(folder))
        save_weights(Path(folder), self._parameters.arrays())

    def _mean(self, inputs: TokenIds, targets: TokenIds, scale: float | None) -> float:
        """Return the mean loss, and add the gradients of `scale` times it, if any."""
        count = max(1, int((targets != IGNORED).sum()))
        scale = None if scale is None else scale / count
        arguments = (self._operations, self.config, self._parameters, inputs, targets)
        return batch_loss(*arguments, scale=scale) / count

    def _checked(
        self, token_ids: ArrayLike, targets: ArrayLike | None
    ) -> tuple[TokenIds, TokenIds]:
        """Return inputs and targets [batch, context]."""
        inputs = self._integers("token_ids", token_ids)
        if targets is None:
            inputs, expected = inputs[:, :-1], inputs[:, 1:]
        else:
            expected = self._integers("targets", targets, lowest=IGNORED)
        if inputs.shape != expected.shape or not inputs.size:
            raise TrainingError(
                f"token_ids have the shape {inputs.shape} and targets {expected.shape}, but both "
                "must have one shape [batch, context] and a token or more"
            )
        if inputs.shape[1] > self.config.max_positions:
            raise TrainingError(
                f"a sequence has {inputs.shape[1]} tokens, but the positions of the model end at "
                f"{self.config.max_positions}"
            )
        return np.ascontiguousarray(inputs), np.ascontiguousarray(expected)

    def _integers(self, name: str, values: ArrayLike, lowest: int = 0) -> TokenIds:
        try:
            array = np.asarray(values)
        except ValueError:
            raise TrainingError(
                f"{name} have rows of different lengths, but must be integers [batch, context]; "
                "give a batch for each length, or pad the rows and set the targets there to -1"
            ) from None
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise TrainingError(
                f"{name} are {array.dtype} {list(array.shape)}, but must be integers "
                "[batch, context]"
            )
        low, high = int(array.min(initial=0)), int(array.max(initial=0))
        if low < lowest or high >= self.config.vocab:
            wrong = low if low < lowest else high
            ignored = f", and {IGNORED} ignores a target" if lowest == IGNORED else ""
            raise TrainingError(
                f"{name} have {wrong}, but the vocabulary has the tokens 0 to "
                f"{self.config.vocab - 1}{ignored}"
            )
        return array.astype(np.int64)


def _check_settings(**settings: Any) -> None:
    """Raise TrainingError unless these settings of a TrainingConfig have valid values."""
    if problems := wrong_values(settings):
        raise TrainingError("; ".join(problems.values()))


def _save_copies(source: Path, config: ModelConfig, folder: Path) -> None:
    """Write the files of a checkpoint that was loaded from `source`, apart from the weights."""
    tokenizer = load_tokenizer(source)
    save_model_files(folder, config, tokenizer, checkpoint=source, tokenizer_source=source)
