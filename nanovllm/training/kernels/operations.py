"""The operations of training on compiled kernels."""

from collections.abc import Callable, Hashable

import numpy as np

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, round_up
from nanovllm.model.kernels.build.target import KernelTarget, host_spec
from nanovllm.model.machine import default_threads
from nanovllm.training.kernels.attention.layout import backward_memory, forward_memory, panel_width
from nanovllm.training.kernels.records import (
    GRADIENT_ROWS,
    IDENTITY,
    ITEM_ELEMENTS,
    ITEM_ROWS,
    KINDS,
    LOGITS_FLOATS,
    MAX_PIECE,
    SCRATCH_FLOATS,
)
from nanovllm.training.kernels.runner import Argument, Observer, OperationRunner
from nanovllm.training.network.dropout import Key, threshold
from nanovllm.training.network.operations import (
    IGNORED,
    AdamWStep,
    Array,
    AttentionShape,
    Pass,
    Rows,
    Targets,
    TokenIds,
    check_residual,
)

_NO_KEY = np.zeros(1, dtype=np.uint64)


class CompiledOperations:
    """Operations in float32, compiled; for one caller at a time.

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
        target = target or host_spec().target
        self._runner = OperationRunner(num_threads or default_threads(), target)
        self._empty, self._run = self._runner.empty, self._runner.run

    @property
    def num_threads(self) -> int:
        """Threads that compute a large operation."""
        return self._runner.threads

    def close(self) -> None:
        """End the helper threads, and release the plans of passes."""
        self._runner.close()

    def time_runs(self, observer: Observer | None) -> None:
        """Call observer(run, seconds, times) after each run from now on, or nothing if None."""
        self._runner.time_runs(observer)

    def run_pass(self, key: Hashable, compute: Pass, *inputs: np.ndarray) -> float:
        """Return compute(*inputs), by a plan for this key and the shapes of the inputs."""
        return self._runner.run_pass(key, compute, inputs)

    def embed(self, token_ids: TokenIds, token_embedding: Array, position_embedding: Array) -> Rows:
        """Return token_embedding[token] + position_embedding[position] of each token."""
        self._check_tokens("token", token_ids, len(token_embedding))
        _check_positions(token_ids, position_embedding)
        d_model = token_embedding.shape[1]
        out = self._empty(token_ids.size, d_model)
        self._run(
            "embed",
            out.size,
            token_ids=token_ids,
            token_embedding=token_embedding,
            position_embedding=position_embedding,
            out=out,
        )
        return out

    def embed_backward(
        self,
        grad_out: Rows,
        token_ids: TokenIds,
        grad_token_embedding: Array,
        grad_position_embedding: Array | None,
    ) -> None:
        """Add each row's gradient to its token's embedding, and to its position's if learned."""
        self._check_tokens("token", token_ids, len(grad_token_embedding))
        if grad_position_embedding is not None:
            _check_positions(token_ids, grad_position_embedding)
        self._run(
            "embed_backward",
            2 * grad_out.size,
            grad_out=grad_out,
            token_ids=token_ids,
            grad_token_embedding=grad_token_embedding,
            grad_position_embedding=grad_position_embedding,
        )

    def layer_norm(
        self, x: Rows, gain: Array, bias: Array, epsilon: float
    ) -> tuple[Rows, Array, Array]:
        """Return gain * n + bias with n = (x - mean) * inverse, and each row's mean and inverse."""
        out, mean, inverse = self._empty(*x.shape), self._empty(len(x)), self._empty(len(x))
        self._run(
            "layer_norm",
            8 * x.size,
            x=x,
            gain=gain,
            bias=bias,
            out=out,
            mean=mean,
            inverse=inverse,
            epsilon=epsilon,
        )
        return out, mean, inverse

    def layer_norm_backward(
        self,
        grad_out: Rows,
        x: Rows,
        gain: Array,
        mean: Array,
        inverse: Array,
        grad_gain: Array,
        grad_bias: Array,
        onto: Rows | None,
    ) -> Rows:
        """Return grad_x, added to `onto` in its memory if given."""
        rows, d_model = x.shape
        grad_x = self._empty(rows, d_model) if onto is None else onto
        self._run(
            "layer_norm_backward",
            16 * x.size,
            grad_out=grad_out,
            x=x,
            gain=gain,
            mean=mean,
            inverse=inverse,
            onto=onto,
            grad_x=grad_x,
            partial=self._panels(-(-rows // ITEM_ROWS) * 2, d_model),
            grad_gain=grad_gain,
            grad_bias=grad_bias,
        )
        return grad_x

    def dropout(self, x: Rows, rate: float, key: Key, residual: Rows | None = None) -> Rows:
        """Return [residual +] x, set to 0 at `rate` and elsewhere divided by 1 - rate."""
        out = self._empty(*x.shape)
        self._run(
            "dropout",
            16 * x.size,
            residual=residual,
            x=x,
            out=out,
            **_dropout_arguments(rate, key),
        )
        return out

    def linear(
        self,
        x: Rows,
        weight: Array,
        bias: Array,
        activation: str,
        residual: Rows | None = None,
        *,
        needs_slope: bool = True,
    ) -> tuple[Rows, Rows | None]:
        """Return f(z) or residual + z, and f'(z) or None; z = x @ weight + bias."""
        check_residual(activation, residual)
        rows, (d_in, d_out) = len(x), weight.shape
        kind = KINDS.index(ACTIVATIONS[activation].name)
        out = self._empty(rows, d_out)
        slope = self._empty(rows, d_out) if needs_slope and kind != IDENTITY else None
        self._run(
            "linear",
            2 * rows * weight.size,
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
            slope=slope,
            out=out,
            panels=self._panels(d_in, d_out),
            scratch=self._scratch(),
            kind=kind,
        )
        return out, slope

    def linear_backward(
        self,
        grad_out: Rows,
        x: Rows,
        weight: Array,
        slope: Rows | None,
        grad_weight: Array,
        grad_bias: Array,
    ) -> Rows:
        """Return grad_x; overwrites grad_out where there is a slope."""
        rows, (d_in, d_out) = len(x), weight.shape
        grad_x = self._empty(rows, d_in)
        blocks = -(-rows // GRADIENT_ROWS)
        self._run(
            "linear_backward",
            4 * rows * weight.size,
            grad_out=grad_out,
            slope=slope,
            x=x,
            weight=weight,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            grad_x=grad_x,
            grad_panels=self._panels(rows, d_out),
            weight_panels=self._panels(d_out, d_in),
            bias_sums=self._panels(blocks, d_out),
            scratch=self._scratch(),
        )
        return grad_x

    def attention(self, qkv: Rows, shape: AttentionShape) -> tuple[Rows, Array]:
        """Return causal self-attention, and the logsumexp of each row of scores."""
        out = self._empty(len(qkv), qkv.shape[1] // 3)
        logsumexp = self._empty(shape.batch, shape.heads, shape.context)
        self._attend("attention", shape, forward_memory, qkv=qkv, out=out, logsumexp=logsumexp)
        return out, logsumexp

    def attention_backward(
        self, grad_out: Rows, qkv: Rows, out: Rows, logsumexp: Array, shape: AttentionShape
    ) -> Rows:
        """Return grad_qkv."""
        grad_qkv = self._empty(*qkv.shape)
        self._attend(
            "attention_backward",
            shape,
            backward_memory,
            grad_out=grad_out,
            qkv=qkv,
            out=out,
            logsumexp=logsumexp,
            grad_qkv=grad_qkv,
        )
        return grad_qkv

    def _attend(
        self,
        name: str,
        shape: AttentionShape,
        memory: Callable[[int, int, int], dict[str, int]],
        **arrays: Array,
    ) -> None:
        """Run an entry of attention with working memory for each thread."""
        assert shape.is_causal, "the compiled attention has no other mask"
        d_model = arrays["out"].shape[1]
        head_dim = d_model // shape.heads
        layout = memory(shape.context, head_dim, panel_width(self._runner.target))
        scratch_words = self._runner.threads * layout["scratch_bytes"] // WORD_BYTES
        self._run(
            name,
            4 * shape.context * arrays["out"].size,
            batch=shape.batch,
            context=shape.context,
            heads=shape.heads,
            head_dim=head_dim,
            scale=shape.scale,
            scratch=self._empty(scratch_words),
            **layout,
            **_dropout_arguments(shape.dropout, shape.key),
            **arrays,
        )

    def cross_entropy(
        self,
        hidden: Rows,
        head: Array,
        targets: Targets,
        scale: float = 0.0,
        grad_head: Array | None = None,
    ) -> tuple[float, Rows | None]:
        """Return the sum of -log softmax(hidden @ head^T)[target], and the gradient of hidden."""
        tokens, (vocab, d_model) = len(targets), head.shape
        self._check_tokens("target", targets, vocab, lowest=IGNORED)
        grad_hidden = None if grad_head is None else self._empty(tokens, d_model)
        transposed_panels = self._panels(d_model, vocab)
        panels = None if grad_head is None else self._panels(vocab, d_model)
        self._run(
            "pack_head",
            2 * head.size,
            head=head,
            transposed_panels=transposed_panels,
            panels=panels,
        )
        chunk_rows = min(tokens, max(1, LOGITS_FLOATS // (vocab * MAX_PIECE)) * MAX_PIECE)
        logits, scratch = self._empty(chunk_rows, vocab), self._scratch()
        hidden_panels = None if grad_head is None else self._panels(chunk_rows, d_model)
        # In no plan's block, because Python reads them.
        sums, target_logits = aligned_zeros(tokens), aligned_zeros(tokens)
        for first in range(0, tokens, chunk_rows):
            rows = slice(first, first + chunk_rows)
            count = len(targets[rows])
            self._run(
                "cross_entropy",
                (2 if grad_head is None else 6) * count * head.size,
                head=head,
                hidden=hidden[rows],
                targets=targets[rows],
                transposed_panels=transposed_panels,
                panels=panels,
                hidden_panels=hidden_panels,
                logits=logits,
                grad_hidden=None if grad_hidden is None else grad_hidden[rows],
                grad_head=grad_head,
                sums=sums[rows],
                target_logits=target_logits[rows],
                scratch=scratch,
                scale=scale,
            )

        def total_loss() -> float:
            losses = np.where(targets == IGNORED, 0.0, np.log(sums) - target_logits)
            return float(losses.sum(dtype=np.float64))

        return self._runner.result(total_loss), grad_hidden

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of the squares of all elements, in float64."""
        partial_sums = self._empty(-(-array.size // ITEM_ELEMENTS), dtype=np.dtype(np.float64))
        self._run("sum_of_squares", 4 * array.size, values=array, partial_sums=partial_sums)
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
        self._run(
            "adamw",
            20 * parameters.size,
            parameters=parameters,
            gradients=gradients,
            first_moment=first_moment,
            second_moment=second_moment,
            gradient_scale=settings.gradient_scale,
            first_rate=1.0 - settings.beta1,
            second_rate=1.0 - settings.beta2,
            first_correction=1.0 / (1.0 - settings.beta1**settings.step),
            second_correction=1.0 / (1.0 - settings.beta2**settings.step),
            learning_rate=settings.learning_rate,
            decay=1.0 - settings.learning_rate * settings.weight_decay,
            epsilon=settings.epsilon,
        )

    def _check_tokens(self, kind: str, token_ids: np.ndarray, vocab: int, lowest: int = 0) -> None:
        """Raise IndexError for a token, an input or a target, that is not in the vocabulary."""

        def check() -> None:
            if token_ids.min() < lowest or token_ids.max() >= vocab:
                raise IndexError(f"a {kind} is not in the vocabulary of {vocab} tokens")

        self._runner.check(check)

    def _panels(self, steps: int, columns: int) -> Array:
        """Return memory for the panels of a matrix [steps, columns]."""
        return self._empty(steps, round_up(columns, self._runner.target.panel_width))

    def _scratch(self) -> Array:
        """Return the working memory of the threads in a matmul."""
        return self._empty(self._runner.threads, SCRATCH_FLOATS)


def _check_positions(token_ids: TokenIds, position_embedding: Array) -> None:
    """Raise IndexError for sequences that are longer than the position embedding."""
    context, positions = token_ids.shape[1], len(position_embedding)
    if context > positions:
        raise IndexError(f"sequences have {context} tokens, but there are {positions} positions")


def _dropout_arguments(rate: float, key: Key | None) -> dict[str, Argument]:
    return {
        "key": _NO_KEY if key is None else key,
        "threshold": threshold(rate),
        "factor": 1.0 / (1.0 - rate),
    }
