"""The network and the sampler of backend="learn:DIR": the reader's functions instead of our own.

They take the same arrays in the same order.

    step 2  embed, logits          step 5  linear, gelu, feed_forward
    step 3  layer_norm             step 6  greedy, sample
    step 4  split_heads, merge_heads, attention
    step 8  write, gather

With the project's solutions the bits are those of backend="numpy".
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.errors import CheckpointError
from nanovllm.learn.guard import STEP_S, Guard, check_array, check_int
from nanovllm.learn.parts import Parts
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.model.numpy_sampler import NumpySampler, RowSampling, apply_filters
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights


class LearnBackend(NumpyBackend):
    """Weights and KV cache of backend="numpy", and the reader's functions."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        parts: Parts,
        guard: Guard,
        **others: Any,
    ) -> None:
        """Wrap loaded weights; `others` are arguments of NumpyBackend."""
        if config.family != "gpt2":
            raise CheckpointError(f"the course computes GPT-2, not a {config.family} model")
        super().__init__(config, weights, **others)
        self._network = Network(config, weights, parts, guard)
        self._guard = guard
        self._sampling = parts["step06_sampling"]
        self.sampler = LearnSampler(parts, guard, config.vocab)

    def _compute(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        return self._guard.call(STEP_S, self._network.forward, batch, self._cache)

    def _project(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        return self._guard.call(STEP_S, self._network.logits, hidden)

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Return the argmax token of each row, and whether the row has one."""
        scores = self.logits(hidden)
        has_token = np.isfinite(scores.max(axis=1))
        tokens = np.zeros(len(scores), dtype=np.int64)
        for row in np.flatnonzero(has_token).tolist():
            token = self._guard.call(STEP_S, self._sampling.greedy, scores[row])
            tokens[row] = check_int(self._sampling.greedy, token, self.config.vocab)
        return tokens, has_token


class LearnSampler(NumpySampler):
    """Draws tokens with the reader's `sample`; edits, penalties and reports are the project's."""

    def __init__(self, parts: Parts, guard: Guard, vocab: int) -> None:
        """Sample from rows of `vocab` logits."""
        self._sampling, self._guard, self._vocab = parts["step06_sampling"], guard, vocab

    def choose(self, scores: Float32[np.ndarray, " vocab"], row: RowSampling) -> int:
        """Return the token that is drawn from a row after its edits.

        min_p, which the course leaves out, belongs between temperature and top_k.
        """
        temperature = float(row.temperature)
        if row.min_p > 0:
            scores /= row.temperature
            apply_filters(scores, top_k=0, top_p=1.0, min_p=row.min_p)
            temperature = 1.0
        token = self._guard.call(
            STEP_S,
            self._sampling.sample,
            scores,
            temperature=temperature,
            top_k=row.top_k,
            top_p=row.top_p,
            noise=row.noise,
        )
        return check_int(self._sampling.sample, token, self._vocab)


class Network:
    """GPT-2's forward pass over a paged KV cache, in the reader's functions."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, parts: Parts, guard: Guard
    ) -> None:
        """Compute with `weights`; the shapes of results are checked.

        `guard` remembers the first function of a step whose result is not finite.
        """
        self._config, self._weights, self._guard = config, weights, guard
        self._step2, self._step3 = parts["step02_logits"], parts["step03_layer_norm"]
        self._step4, self._step5 = parts["step04_attention"], parts["step05_forward"]
        self._step8 = parts["step08_blocks"]

    @np.errstate(over="ignore", invalid="ignore")
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Float32[np.ndarray, "rows d_model"]:
        """Return the final hidden state of each of the batch's logit rows."""
        self._guard.not_finite = None
        weights, shape = self._weights, (batch.tokens, self._config.d_model)
        hidden = self._step2.embed(
            batch.token_ids, batch.positions, weights.token_embedding, weights.position_embedding
        )
        hidden = self._checked(self._step2.embed, hidden, shape)
        for index, layer in enumerate(weights.layers):
            normed = self._layer_norm(hidden, layer.attention_norm)
            hidden = hidden + self._self_attention(normed, layer, index, batch, cache)
            normed = self._layer_norm(hidden, layer.ffn_norm)
            hidden = hidden + self._feed_forward(normed, layer)
        return self._layer_norm(hidden[batch.logit_rows], weights.final_norm)

    @np.errstate(over="ignore", invalid="ignore")
    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Return the score of every token at rows of final hidden states."""
        scores = self._step2.logits(hidden, self._weights.head)
        return self._checked(self._step2.logits, scores, (len(hidden), self._config.vocab))

    @cached_property
    def _has_finite_weights(self) -> bool:
        """Whether the checkpoint is sound."""
        return _is_finite(self._weights)

    def _checked(
        self, function: Any, found: object, shape: tuple[int, ...]
    ) -> Float32[np.ndarray, "..."]:
        """Return what `function` has returned, as `check_array` does."""
        array = check_array(function, found, shape)
        if self._guard.not_finite is None and not np.isfinite(array).all():
            self._guard.not_finite = function if self._has_finite_weights else None
        return array

    def _layer_norm(
        self, hidden: Float32[np.ndarray, "tokens d_model"], norm: LayerNorm
    ) -> Float32[np.ndarray, "tokens d_model"]:
        normed = self._step3.layer_norm(hidden, norm.gain, norm.bias, self._config.epsilon)
        return self._checked(self._step3.layer_norm, normed, hidden.shape)

    def _linear(
        self, rows: Float32[np.ndarray, "tokens d_in"], layer: Linear
    ) -> Float32[np.ndarray, "tokens d_out"]:
        shape = (len(rows), layer.weight.shape[1])
        return self._checked(self._step5.linear, self._step5.linear(rows, layer), shape)

    def _self_attention(
        self,
        hidden: Float32[np.ndarray, "tokens d_model"],
        weights: Layer[Linear],
        layer: int,
        batch: ForwardBatch,
        cache: KVCache,
    ) -> Float32[np.ndarray, "tokens d_model"]:
        config, step4, step8 = self._config, self._step4, self._step8
        queries, keys, values = np.split(self._linear(hidden, weights.qkv), 3, axis=1)
        pools = cache.keys[layer], cache.values[layer]  # [blocks, block_size, heads, head_dim]
        slots = batch.slots.tolist()
        heads_shape = (config.heads, config.head_dim)
        for pool, rows in zip(pools, (keys, values), strict=True):
            step8.write(pool, slots, rows.reshape(-1, *heads_shape))
        # The course's attention scales by 1 / sqrt(head_dim); a few checkpoints want another scale.
        factor = config.attention_scale(layer) * math.sqrt(config.head_dim)
        if not math.isclose(factor, 1.0):
            queries = queries * np.float32(factor)
        attn_out = np.empty((batch.tokens, config.d_model), dtype=np.float32)
        for seq in range(batch.seqs):
            start, end = batch.query_starts[seq : seq + 2].tolist()
            count = int(batch.context_lens[seq])
            blocks = batch.block_tables[seq, : -(-count // cache.block_size)].tolist()
            context = []
            for pool in pools:
                found = step8.gather(pool, blocks, count)
                found = self._checked(step8.gather, found, (count, *heads_shape))
                context.append(found.transpose(1, 0, 2))
            shape = (config.heads, end - start, config.head_dim)
            heads_in = step4.split_heads(queries[start:end], config.heads)
            heads_in = self._checked(step4.split_heads, heads_in, shape)
            heads_out = step4.attention(heads_in, *context)
            heads_out = self._checked(step4.attention, heads_out, shape)
            merged = step4.merge_heads(heads_out)
            attn_out[start:end] = self._checked(
                step4.merge_heads, merged, (end - start, config.d_model)
            )
        return self._linear(attn_out, weights.out)

    def _feed_forward(
        self, hidden: Float32[np.ndarray, "tokens d_model"], layer: Layer[Linear]
    ) -> Float32[np.ndarray, "tokens d_model"]:
        if self._config.activation == "gelu_new":
            out = self._step5.feed_forward(hidden, layer.up, layer.down)
            return self._checked(self._step5.feed_forward, out, hidden.shape)
        activation = ACTIVATIONS[self._config.activation]
        return self._linear(activation(self._linear(hidden, layer.up)), layer.down)


def _is_finite(node: Any) -> bool:
    """Return whether all numbers of a tree of weights are finite."""
    if node is None:  # GPT-2 lacks some of the tree's arrays
        return True
    if isinstance(node, np.ndarray):
        return bool(np.isfinite(node).all())
    is_list = isinstance(node, Sequence)
    return all(
        map(_is_finite, node if is_list else (getattr(node, one.name) for one in fields(node)))
    )
