"""AdamW with gradient clipping."""

import math

import numpy as np

from nanovllm.errors import TrainingError
from nanovllm.training.network.operations import AdamWStep, Operations
from nanovllm.training.network.parameters import Parameters


class AdamW:
    """Updates parameters from their gradients.

    Attributes:
        updates: number of updates so far.
        first_moment, second_moment: flat arrays in the layout of the parameters.
    """

    def __init__(
        self,
        parameters: Parameters,
        operations: Operations,
        *,
        weight_decay: float,
        grad_clip: float,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
    ) -> None:
        """Begin with moments of 0; `grad_clip` is the largest norm of the gradient, 0 for any."""
        self._parameters = parameters
        self._operations = operations
        self._weight_decay = weight_decay
        self._grad_clip = grad_clip
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self.updates = 0
        self.first_moment = np.zeros_like(parameters.values)
        self.second_moment = np.zeros_like(parameters.values)

    def update(self, learning_rate: float) -> float:
        """Apply the gradients and set them to 0; return their norm before clipping.

        Nothing is updated where the norm is not finite. Raises TrainingError unless the learning
        rate is finite and at least 0.
        """
        if not 0 <= learning_rate < math.inf:
            raise TrainingError(
                f"learning_rate is {learning_rate!r} but must be finite and at least 0"
            )
        norm = math.sqrt(self._operations.sum_of_squares(self._parameters.gradients))
        if not math.isfinite(norm):
            return norm
        scale = 1.0
        if self._grad_clip and norm > self._grad_clip:
            scale = self._grad_clip / norm
        self.updates += 1
        for group in self._parameters.groups:
            settings = AdamWStep(
                step=self.updates,
                learning_rate=learning_rate,
                weight_decay=self._weight_decay if group.is_decayed else 0.0,
                beta1=self._beta1,
                beta2=self._beta2,
                epsilon=self._epsilon,
                gradient_scale=scale,
            )
            self._operations.adamw(
                self._parameters.values[group.range],
                self._parameters.gradients[group.range],
                self.first_moment[group.range],
                self.second_moment[group.range],
                settings,
            )
        return norm
