"""GPT-2's forward pass for training: that of model/families/forward.py, on a tape.

The operations, their order and their names are the same. There is no KV cache: all tokens
of a sequence are computed at once. Dropout is where GPT-2 has it: after the embedding, on the
attention weights, and at the end of both residual branches. `config.ablated` leaves parts out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt64

from nanovllm.model.config import ModelConfig
from nanovllm.training.network.autograd import Tape, Tensor
from nanovllm.training.network.dropout import site_key
from nanovllm.training.network.operations import AttentionShape, Operations, TokenIds
from nanovllm.training.network.parameters import Parameters

Keys = UInt64[np.ndarray, "sites 1"]

GROUP_TOKENS = 1024
"""Most tokens whose activations are in memory together; more only in a single sequence."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """Rate and random numbers of the dropout of a batch.

    Attributes:
        step: number of the batch in the run.
    """

    rate: float = 0.0
    seed: int = 0
    step: int = 0

    def keys(self, config: ModelConfig, group: int = 0) -> Keys:
        """Return a key for each use of dropout in a forward pass.

        Args:
            config: sizes of the network.
            group: number of the forward pass in the batch; each has masks of its own.
        """
        sites = 1 + 3 * config.layers if self.rate else 0
        keys = [site_key(self.seed, self.step, group, site) for site in range(sites)]
        return np.array(keys, dtype=np.uint64).reshape(sites, 1)


NO_DROPOUT = Dropout()


def forward(
    tape: Tape,
    config: ModelConfig,
    parameters: Parameters,
    token_ids: TokenIds,
    rate: float = 0.0,
    keys: Keys | None = None,
) -> Tensor:
    """Return the final hidden states [batch * context, d_model].

    Args:
        tape: records the operations.
        config: sizes of the network.
        parameters: of the network.
        token_ids: a batch of sequences.
        rate: of dropout.
        keys: `Dropout.keys`, where the rate is not 0.
    """
    weights = parameters.tensors
    batch, context = token_ids.shape
    sites = iter(() if keys is None else keys)

    def drop(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return tape.dropout(x, rate, next(sites), residual)

    def add_branch(name: str, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the sum of the residual stream and a branch, whose last linear layer is `name`."""
        residual = None if "residual" in config.ablated else hidden
        if rate:
            return drop(_linear(tape, weights, name, x), residual)
        return _linear(tape, weights, name, x, residual=residual)

    hidden = tape.embed(token_ids, weights["wte.weight"], weights["wpe.weight"])
    if rate:
        hidden = drop(hidden)
    for layer in range(config.layers):
        block = f"h.{layer}"
        normed = _layer_norm(tape, config, weights, f"{block}.ln_1", hidden)
        qkv = _linear(tape, weights, f"{block}.attn.c_attn", normed)
        shape = AttentionShape(
            batch,
            context,
            config.heads,
            config.attention_scale(layer),
            rate,
            next(sites, None),
            is_causal="causal-mask" not in config.ablated,
        )
        attn_out = tape.attention(qkv, shape)
        hidden = add_branch(f"{block}.attn.c_proj", attn_out, hidden)
        if "ffn" in config.ablated:
            continue
        normed = _layer_norm(tape, config, weights, f"{block}.ln_2", hidden)
        ffn_hidden = _linear(tape, weights, f"{block}.mlp.c_fc", normed, config.activation)
        hidden = add_branch(f"{block}.mlp.c_proj", ffn_hidden, hidden)
    return _layer_norm(tape, config, weights, "ln_f", hidden)


def batch_loss(
    operations: Operations,
    config: ModelConfig,
    parameters: Parameters,
    token_ids: TokenIds,
    targets: TokenIds,
    *,
    scale: float | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> float:
    """Return the sum over a batch's tokens of the cross-entropy of the next token, in nats.

    With a `scale`, also add the gradients of `scale` times this sum: 1 / tokens gives those of the
    mean, and several batches of an update add up.

    The sequences of a batch are independent, and their gradients add up. So they are computed in
    groups of up to GROUP_TOKENS tokens, and only the activations of one group are in memory. The
    groups depend on the shape of the batch alone, so every run adds in the same order.
    """
    head = _head(config, parameters)

    def group_loss(token_ids: TokenIds, targets: TokenIds, keys: Keys) -> float:
        tape = Tape(operations, records=scale is not None)
        hidden = forward(tape, config, parameters, token_ids, dropout.rate, keys)
        loss = tape.cross_entropy(hidden, head, targets.reshape(-1), scale or 0.0)
        tape.backward()
        return loss

    batch, context = token_ids.shape
    groups = -(-batch // max(1, GROUP_TOKENS // context))
    key = (parameters, config, scale, dropout.rate)
    total = 0.0
    for group in range(groups):
        sequences = slice(batch * group // groups, batch * (group + 1) // groups)
        keys = dropout.keys(config, group)
        # NumPy's operations call `group_loss`; compiled ones plan its operations once and run them.
        total += operations.run_pass(
            key, group_loss, token_ids[sequences], targets[sequences], keys
        )
    return total


def next_logits(
    operations: Operations, config: ModelConfig, parameters: Parameters, token_ids: Sequence[int]
) -> Float[np.ndarray, " vocab"]:
    """Return the scores of the token after a sequence, without a KV cache."""
    tape = Tape(operations, records=False)
    hidden = forward(tape, config, parameters, np.array([token_ids], dtype=np.int64))
    head = _head(config, parameters).data
    return hidden.data[-1] @ head.T


def _head(config: ModelConfig, parameters: Parameters) -> Tensor:
    return parameters.tensors["wte.weight" if config.tied_head else "lm_head.weight"]


def _layer_norm(
    tape: Tape, config: ModelConfig, weights: dict[str, Tensor], name: str, x: Tensor
) -> Tensor:
    if "layer-norm" in config.ablated:
        return tape.copy(x)
    return tape.layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], config.epsilon)


def _linear(
    tape: Tape,
    weights: dict[str, Tensor],
    name: str,
    x: Tensor,
    activation: str = "linear",
    residual: Tensor | None = None,
) -> Tensor:
    return tape.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"], activation, residual)
