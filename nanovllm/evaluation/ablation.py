"""ablate: the loss of a checkpoint on text with each of its parts switched off in turn.

The loss is that of `evaluate`. With the losses a[i] of the predicted tokens while a part is off and
b[i] of the whole network,

    change         = mean(a - b)                   nats per token
    standard error = std(a - b) / sqrt(N)          of that mean over N tokens

A part that matters has a change of many standard errors. Every loss is that of a network which was
loaded without the part, so it is the same computation as that of any other checkpoint.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float64

from nanovllm.config import EngineConfig
from nanovllm.engine.loading import load_options, with_stored_dtype
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.evaluation.perplexity import (
    TextSource,
    bits_per_byte,
    check_windows,
    encode_texts,
    read_texts,
)
from nanovllm.evaluation.scoring import cut_windows, score_windows
from nanovllm.hub import resolve_model
from nanovllm.model.ablation import PART_KINDS, Part, PartKind, parts_of
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.progress import progress_bar
from nanovllm.runner.native_model_runner import NativeModelRunner


@dataclass(frozen=True, slots=True)
class AblatedLoss:
    """The loss without a part.

    Attributes:
        part: what was switched off.
        loss: mean cross-entropy in nats per token.
        change: `loss` less that of the whole network.
        standard_error: of `change`.
        bits_per_byte: the loss in bits per UTF-8 byte of the text.
    """

    part: Part
    loss: float
    change: float
    standard_error: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class AblationResult:
    """What `ablate` measured.

    Attributes:
        model: sizes of the network.
        context: maximum number of tokens that a prediction sees.
        texts, tokens, bytes: number of texts, of predicted tokens and of their UTF-8 bytes.
        loss, bits_per_byte: of the whole network.
        parts: of each part, layer by layer.
    """

    model: ModelConfig
    context: int
    texts: int
    tokens: int
    bytes: int
    loss: float
    bits_per_byte: float
    parts: tuple[AblatedLoss, ...]


def ablate(
    model: str | os.PathLike[str],
    data: TextSource | Iterable[TextSource],
    *,
    kinds: Collection[PartKind] = PART_KINDS,
    pattern: str = "*.txt",
    context: int | None = None,
    max_tokens: int | None = None,
    use_tqdm: bool = True,
    **precision: Any,
) -> AblationResult:
    """Return the loss of a checkpoint on texts, whole and without each part in turn.

    >>> max(ablate("tiny-books", text, kinds=["head"]).parts, key=lambda each: each.change).part

    Args:
        model, data, pattern, context, max_tokens: as for `evaluate`.
        kinds: the parts that are switched off: "head", "attention", "ffn", "block".
        use_tqdm: show progress on a terminal or in a notebook.
        precision: dtype, quantization, kv_cache_dtype, backend and num_threads, as for `evaluate`.

    Raises as `evaluate` does.
    """
    unknown = [kind for kind in kinds if kind not in PART_KINDS]
    if unknown:
        raise ValueError(f"kinds has {unknown[0]!r} but must be of {', '.join(PART_KINDS)}")
    texts = read_texts(data, pattern)
    folder = resolve_model(model)
    config = with_stored_dtype(EngineConfig(**precision), folder)
    context, stride = check_windows(folder, context, None)
    encoded = encode_texts(Tokenizer.load(folder), texts, None, max_tokens)
    network = load_config(folder)
    parts = parts_of(network, kinds)
    losses: dict[Part, np.ndarray] = {}
    options = load_options(config)

    def score(*off: Part) -> Float64[np.ndarray, " tokens"]:
        runner = NativeModelRunner.load(folder, config.backend, replace(options, without=off))
        windows = chain.from_iterable(cut_windows(ids, context, stride) for ids, _ in encoded)
        return score_windows(runner.backend, windows).losses

    with progress_bar(total=len(parts), unit="part", is_wanted=use_tqdm) as bar:
        whole = score()
        for part in parts:
            losses[part] = score(part)
            bar.update()
    num_bytes = sum(size for _, size in encoded)
    return AblationResult(
        model=network,
        context=context,
        texts=len(encoded),
        tokens=len(whole),
        bytes=num_bytes,
        loss=float(whole.mean()),
        bits_per_byte=bits_per_byte(whole, num_bytes),
        parts=tuple(_compare(part, losses[part], whole, num_bytes) for part in parts),
    )


def _compare(
    part: Part,
    losses: Float64[np.ndarray, " tokens"],
    whole: Float64[np.ndarray, " tokens"],
    num_bytes: int,
) -> AblatedLoss:
    changes = losses - whole
    return AblatedLoss(
        part,
        loss=float(losses.mean()),
        change=float(changes.mean()),
        standard_error=float(changes.std()) / len(changes) ** 0.5,
        bits_per_byte=bits_per_byte(losses, num_bytes),
    )
