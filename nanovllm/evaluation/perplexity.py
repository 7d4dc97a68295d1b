"""evaluate: loss, perplexity and bits per byte of a checkpoint on text.

Each text is tokenized and scored on its own, so that no window spans two files. A literal
`<|endoftext|>` is encoded as the special token, as in training. Windows and the context of each
prediction are defined in scoring.py: every token but a text's first is predicted exactly once.
With N probabilities p[i] of predicted tokens and B bytes,

    loss          = sum(-ln p[i]) / N            nats per token
    perplexity    = exp(loss)
    bits per byte = sum(-ln p[i]) / ln 2 / B     independent of the tokenizer (Gao et al. 2020,
                                                 "The Pile", section 3.1)

The sums are float64. B counts the UTF-8 bytes of the predicted tokens only: without a text's first
token, and without the tokens after `max_tokens`. Line ends of files are normalized. A tokenizer
that is not byte-level counts a character of several tokens with the first of them.

This module is above the engine, not in nanovllm/training, because it needs model names and the
engine's loading of checkpoints and tokenizers. The scores come from the backend directly: the
engine's prompt_logprobs are Python objects per token and lack float64 sums.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from nanovllm.config import BackendName, DType, EngineConfig, KVCacheDType, Quantization
from nanovllm.engine.engine import Engine
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import TrainingError, counted
from nanovllm.evaluation.scoring import cut_windows, score_windows
from nanovllm.hub import resolve_model
from nanovllm.model.families.registry import load_config
from nanovllm.progress import progress_bar
from nanovllm.training.data.text import pieces, read_documents

TextSource: TypeAlias = str | os.PathLike[str]
"""A text, or the path of a file or folder of texts."""


_PIECE_CHARACTERS = 2**20
"""Characters that are encoded at once: the library needs about 100 MB for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """What `evaluate` measured.

    Attributes:
        precision: type of the weights: "float32", "bfloat16" or "int8".
        backend: implementation of the forward pass.
        num_threads: compute threads.
        kv_cache_dtype: type of keys and values.
        context: maximum number of tokens that a prediction sees.
        stride: tokens between the starts of windows.
        texts: number of texts with predictions.
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes of the predicted tokens.
        accuracy: fraction of predictions whose most probable token is the text's.
        duration_s: time to score all windows, without loading and tokenizing.
        losses: -ln p of every predicted token, in nats.
        argmax_tokens: the most probable token at every prediction.
    """

    precision: str
    backend: str
    num_threads: int
    kv_cache_dtype: str
    context: int
    stride: int
    texts: int
    tokens: int
    bytes: int
    accuracy: float
    duration_s: float
    losses: NDArray[np.float64] = field(compare=False, repr=False)
    argmax_tokens: NDArray[np.int64] = field(compare=False, repr=False)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return float(self.losses.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that exceeds a float64."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.float64(self.loss)))

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy in bits per UTF-8 byte of the text."""
        return bits_per_byte(self.losses, self.bytes)

    @property
    def tokens_per_s(self) -> float:
        """Predicted tokens per second."""
        return self.tokens / self.duration_s

    def top1_agreement(self, reference: "EvaluationResult") -> float:
        """Return the fraction of predictions whose most probable token is the reference's.

        Both results must be of the same text and windows.
        """
        if len(self.argmax_tokens) != len(reference.argmax_tokens):
            raise ValueError(
                f"the results have {self.tokens} and {reference.tokens} predictions; compare "
                "results of the same text"
            )
        return float((self.argmax_tokens == reference.argmax_tokens).mean())


def evaluate(
    model: str | os.PathLike[str],
    data: TextSource | Iterable[TextSource],
    *,
    dtype: DType = "float32",
    quantization: Quantization | None = None,
    kv_cache_dtype: KVCacheDType = "auto",
    backend: BackendName = "numba",
    num_threads: int | None = None,
    pattern: str = "*.txt",
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    add_bos_token: bool = False,
    use_tqdm: bool = True,
) -> EvaluationResult:
    """Return the loss, perplexity and bits per byte of a checkpoint on texts.

    >>> evaluate("gpt2", Path("wikitext"), quantization="int8").perplexity

    Args:
        model: a folder, a name such as "gpt2", or the bundled model, as for LLM.
        data: one or several; a `str` is a text, a `Path` a file or folder of UTF-8 text.
        dtype, quantization, kv_cache_dtype, backend, num_threads: as for LLM.
        pattern: which files of a folder to read.
        context: maximum inputs of a window; None for all positions of the model.
        stride: distance between the starts of windows; None for `context`, without overlap.
        max_tokens: maximum number of predicted tokens over all texts; None for all.
        add_bos_token: begin every text with the token that the tokenizer puts before a text, or
            with the model's end-of-text token where it puts none, so that its first token is
            predicted too, as lm-evaluation-harness does.
        use_tqdm: show progress on a terminal or in a notebook.

    Raises:
        TrainingError: the data cannot be read or has no token to predict.
        ModelNotFoundError: there is no model of that name.
        CheckpointError: the folder is not valid.
        ValueError: a setting is wrong.
    """
    texts = read_texts(data, pattern)
    config = EngineConfig(
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        backend=backend,
        num_threads=num_threads,
        num_blocks=1,  # score_windows allocates its own cache
    )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens} but must be at least 1")
    folder = resolve_model(model)
    context, stride = check_windows(folder, context, stride)
    with closing(Engine.load(folder, config)) as engine:
        bos_token = _bos_token(engine) if add_bos_token else None
        encoded = encode_texts(engine.tokenizer, texts, bos_token, max_tokens)
        targets = np.concatenate([token_ids[1:] for token_ids, _ in encoded])
        windows = chain.from_iterable(cut_windows(one, context, stride) for one, _ in encoded)
        precision = quantization or dtype
        network = engine.runner.backend
        started_s = time.perf_counter()
        with progress_bar(
            total=len(targets), desc=precision, unit="token", unit_scale=True, is_wanted=use_tqdm
        ) as bar:
            scores = score_windows(network, windows, bar.update)
        return EvaluationResult(
            precision=precision,
            backend=backend,
            num_threads=network.num_threads,
            kv_cache_dtype=network.cache_dtype,
            context=context,
            stride=stride,
            texts=len(encoded),
            tokens=len(targets),
            bytes=sum(num_bytes for _, num_bytes in encoded),
            accuracy=float((scores.argmax_tokens == targets).mean()),
            duration_s=time.perf_counter() - started_s,
            losses=scores.losses,
            argmax_tokens=scores.argmax_tokens,
        )


def bits_per_byte(losses: NDArray[np.float64], num_bytes: int) -> float:
    """Return the sum of losses in nats as bits per byte of a text."""
    return float(losses.sum()) / float(np.log(2.0)) / num_bytes


def check_windows(folder: Path, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return context and stride with their defaults; raise ValueError if the model has fewer."""
    positions = load_config(folder).max_positions
    context = positions if context is None else context
    if not 1 <= context <= positions:
        raise ValueError(
            f"context is {context}, but the model has {positions} positions; choose from 1 to "
            f"{positions}"
        )
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride is {stride}, but the context is {context}; choose from 1 to {context}"
        )
    return context, stride


def read_texts(data: TextSource | Iterable[TextSource], pattern: str) -> list[str]:
    """Return the texts among `data`, and then those of its files and folders."""
    sources = [data] if isinstance(data, str | os.PathLike) else list(data)
    texts = [source for source in sources if isinstance(source, str)]
    paths = [Path(source) for source in sources if not isinstance(source, str)]
    if paths:
        corpus = read_documents(paths, pattern)
        for warning in corpus.warnings:
            warnings.warn(warning, stacklevel=3)
        texts += corpus.texts
    return texts


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], bos_token: int | None, max_tokens: int | None
) -> list[tuple[NDArray[np.int64], int]]:
    """Return the token ids of each text, and the UTF-8 bytes of all but the first.

    Texts without a predicted token are left out. Raises TrainingError if none is left.
    """
    encoded = []
    left, longest = sys.maxsize if max_tokens is None else max_tokens, 0
    for text in texts:
        token_ids, byte_ends = _encode(tokenizer, text, left)
        if bos_token is not None:
            token_ids = np.append(np.int64(bos_token), token_ids)
            byte_ends = np.append(np.int64(0), byte_ends)
        longest = max(longest, len(token_ids))
        num_targets = min(len(token_ids) - 1, left)
        if num_targets > 0:
            num_bytes = int(byte_ends[num_targets] - byte_ends[0])
            encoded.append((token_ids[: num_targets + 1], num_bytes))
            left -= num_targets
        if left == 0:
            break
    if sum(num_bytes for _, num_bytes in encoded) == 0:
        raise TrainingError(
            f"the longest text has {counted(longest, 'token')}; at least 2 are needed, because "
            "the first is not predicted; give more text, or add the beginning-of-text token"
        )
    return encoded


def _encode(
    tokenizer: Tokenizer, text: str, max_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return token ids of a text, and the UTF-8 bytes of the text up to each token's end.

    All token ids, or at least `max_tokens` + 1 of them: a long text is encoded in pieces.
    """
    if tokenizer.max_token_bytes is not None:  # the tokens are exactly the text's bytes
        ids = []
        for piece in pieces(text, _PIECE_CHARACTERS):
            ids += tokenizer.encode(piece, add_special_tokens=False, allow_special=True)
            if len(ids) > max_tokens:
                break
        token_ids = np.array(ids, dtype=np.int64)
        unique, index = np.unique(token_ids, return_inverse=True)
        sizes = np.array([len(tokenizer.token_bytes(i)) for i in unique.tolist()], dtype=np.int64)
        return token_ids, np.cumsum(sizes[index])
    ids, character_ends = tokenizer.encode_with_ends(text)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    # UTF-8 needs 1 byte up to U+007F, 2 up to U+07FF, 3 up to U+FFFF.
    sizes = 1 + np.searchsorted([0x80, 0x800, 0x10000], code_points, side="right")
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return np.array(ids, dtype=np.int64), ends[np.array(character_ends, dtype=np.int64)]


def _bos_token(engine: Engine) -> int:
    before, _ = engine.tokenizer.tokens_around_text
    candidates = [*before, *engine.model.eos_token_ids]
    if not candidates:
        raise ValueError(
            "the model has no end-of-text token to begin a text with; leave add_bos_token out"
        )
    return candidates[0]
