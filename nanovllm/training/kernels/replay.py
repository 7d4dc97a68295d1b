"""Replayed passes: the operations of an earlier pass again, without the Python in between.

A pass over a small batch spends a tenth of its time in Python: on the tape, on arrays, and on the
records of operations. But two passes over batches of one shape run the same operations on the same
memory. So the second of them is recorded, as a list of calls, and the later ones copy their tokens
to its arrays and repeat its calls. A graph of CUDA operations saves the same time on a GPU
(https://developer.nvidia.com/blog/cuda-graphs/).

The addresses in a recorded call stay valid:

    parameters, gradients, tokens  the recorded pass refers to their arrays
    results                        the pool owns all memory that it has given to arrays; no array is
                                   in use before and after a pass that is recorded or replayed
    working memory                 the recorded pass refers to its block, and is dropped when a
                                   larger block replaces it
"""

from collections import OrderedDict
from collections.abc import Hashable

from nanovllm.training.kernels.runner import OperationRunner, RecordedCall
from nanovllm.training.network.operations import Pass, TokenIds

_MAX_PASSES = 16  # shapes of batches, in training and in evaluation


class PassReplayer:
    """Records passes and replays them, for one caller at a time."""

    def __init__(self, runner: OperationRunner) -> None:
        """Replay the operations of `runner`."""
        self._runner = runner
        self._passes: OrderedDict[Hashable, _RecordedPass | None] = OrderedDict()
        self._work_bytes = 0

    def clear(self) -> None:
        """Release all recorded passes, and the networks to which they belong."""
        self._passes.clear()

    def run(self, key: Hashable, compute: Pass, token_ids: TokenIds, targets: TokenIds) -> float:
        """Return compute(token_ids, targets), replayed where a pass of this kind is recorded.

        Args:
            key: equal keys mean that `compute` runs the same operations, on the same arrays, on
                batches of one shape.
        """
        runner, passes = self._runner, self._passes
        if runner.target.check or runner.arrays.num_arrays:
            return compute(token_ids, targets)
        if runner.work.size_bytes != self._work_bytes:  # recorded passes refer to a smaller block
            self._work_bytes = runner.work.size_bytes
            passes.update(dict.fromkeys(passes))
        key = (key, token_ids.shape, token_ids.dtype, targets.shape, targets.dtype)
        recorded = passes.get(key)
        if recorded is not None:
            passes.move_to_end(key)
            return recorded.replay(token_ids, targets)
        if key not in passes:  # the first pass allocates the memory
            total = compute(token_ids, targets)
        else:
            recorded = _RecordedPass(token_ids, targets)
            total = recorded.record(runner, compute)
            recorded = None if runner.arrays.num_arrays else recorded
        passes[key] = recorded
        passes.move_to_end(key)
        if len(passes) > _MAX_PASSES:
            passes.popitem(last=False)
        return total


class _RecordedPass:
    """The calls of a pass, in order, and its arrays of tokens."""

    def __init__(self, token_ids: TokenIds, targets: TokenIds) -> None:
        self._token_ids, self._targets = token_ids.copy(), targets.copy()
        self._calls: list[RecordedCall] = []

    def record(self, runner: OperationRunner, compute: Pass) -> float:
        with runner.recording(self._calls):
            return compute(self._token_ids, self._targets)

    def replay(self, token_ids: TokenIds, targets: TokenIds) -> float:
        """Return the result of the last call of Python, which is that of the pass."""
        self._token_ids[:], self._targets[:] = token_ids, targets
        total = 0.0
        for call in self._calls:
            value = call()
            total = total if value is None else value
        return total
