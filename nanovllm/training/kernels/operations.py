"""The operations of training on compiled kernels; the ones not listed here are NumPy's."""

from nanovllm.model.kernels.build.target import KernelTarget, host_target
from nanovllm.model.kernels.threads.cores import default_threads
from nanovllm.training.kernels.records import DTYPES, ITEM_ELEMENTS
from nanovllm.training.kernels.runner import OperationRunner
from nanovllm.training.operations import AdamWStep, Array, NumpyOperations


class CompiledOperations(NumpyOperations):
    """NumpyOperations in float32, compiled; for one caller at a time.

    Arguments must be C-contiguous. No bit of a result depends on the number of threads.
    """

    def __init__(
        self, num_threads: int | None = None, *, target: KernelTarget | None = None
    ) -> None:
        """Load or compile the operations.

        Args:
            num_threads: the default is one for each core that this process may use.
            target: what to compile for; the default is this CPU.
        """
        self._runner = OperationRunner(num_threads or default_threads(), target or host_target())
        self._empty = self._runner.arrays.empty

    @property
    def num_threads(self) -> int:
        """Threads that compute a large operation."""
        return self._runner.threads

    def close(self) -> None:
        """End the helper threads."""
        self._runner.close()

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of the squares of all elements, in float64."""
        partial_sums = self._empty(-(-array.size // ITEM_ELEMENTS), dtype=DTYPES["partial_sums"])
        self._runner.run(
            "sum_of_squares",
            4 * array.size,
            values=array,
            partial_sums=partial_sums,
            count=array.size,
        )
        return float(partial_sums.sum())

    def adamw(
        self,
        parameters: Array,
        gradients: Array,
        first_moment: Array,
        second_moment: Array,
        settings: AdamWStep,
    ) -> None:
        """Update parameters and moments in place, and set the gradients to 0."""
        self._runner.run(
            "adamw",
            20 * parameters.size,
            parameters=parameters,
            gradients=gradients,
            first_moment=first_moment,
            second_moment=second_moment,
            count=parameters.size,
            gradient_scale=settings.gradient_scale,
            first_rate=1.0 - settings.beta1,
            second_rate=1.0 - settings.beta2,
            first_correction=1.0 / (1.0 - settings.beta1**settings.step),
            second_correction=1.0 / (1.0 - settings.beta2**settings.step),
            learning_rate=settings.learning_rate,
            decay=1.0 - settings.learning_rate * settings.weight_decay,
            epsilon=settings.epsilon,
        )
