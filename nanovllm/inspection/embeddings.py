"""Token embeddings in two dimensions, and nearest neighbours.

PCA (Pearson 1901) projects to the two directions of largest variance; t-SNE (van der Maaten and
Hinton 2008) places tokens so that near neighbours stay near, while distances between clusters mean
little. Neighbours are compared in all dimensions, by the cosine.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float32

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.observe import InspectedModel

Method: TypeAlias = Literal["pca", "tsne"]
DEFAULT_POINTS = 2000
MAX_POINTS = 5000
MAX_NEIGHBORS = 100
_TSNE_INPUTS = 50  # dimensions after PCA, as in van der Maaten and Hinton 2008, section 4.2
_PERPLEXITY = 30.0
_SEED = 0


@dataclass(frozen=True, slots=True)
class Projection:
    """Points of tokens in the plane.

    Attributes:
        token_ids: the token of each point.
        points: float32 [tokens, 2].
        explained: fractions of the variance along x and y; None for t-SNE.
    """

    token_ids: tuple[int, ...]
    points: Float32[np.ndarray, "tokens 2"]
    explained: tuple[float, float] | None


def available_methods() -> list[Method]:
    """Return the methods that this installation can compute: t-SNE needs scikit-learn."""
    return ["pca", "tsne"] if importlib.util.find_spec("sklearn") else ["pca"]


def project(
    model: InspectedModel,
    method: Method = "pca",
    limit: int = DEFAULT_POINTS,
    *,
    extra_ids: Sequence[int] = (),
) -> Projection:
    """Return the points of the tokens 0 to `limit` - 1, and of `extra_ids`.

    The ids of a BPE vocabulary are in the order of its merges, so low ids are frequent tokens.

    Raises InvalidRequestError if `limit` is not 3 to MAX_POINTS, or t-SNE is requested without
    scikit-learn.
    """
    if not 3 <= limit <= MAX_POINTS:
        raise InvalidRequestError(f"limit is {limit} but must be 3 to {MAX_POINTS}", param="limit")
    count = min(limit, model.config.vocab)
    token_ids = list(dict.fromkeys([*range(count), *extra_ids]))
    rows = model.weights.token_embedding[np.array(token_ids, dtype=np.int64)]
    if method == "tsne":
        return Projection(tuple(token_ids), tsne(rows), None)
    points, explained = pca(rows, 2)
    return Projection(tuple(token_ids), points, (float(explained[0]), float(explained[1])))


def pca(
    rows: Float32[np.ndarray, "tokens d_model"], dimensions: int
) -> tuple[Float32[np.ndarray, "tokens dimensions"], Float32[np.ndarray, " dimensions"]]:
    """Return the coordinates along the first principal components, and their parts of variance.

    With the singular value decomposition of the centred rows, U S V^T, the coordinates are U S and
    the variances are proportional to S^2. The largest coefficient of each row of V^T is positive,
    because the signs of a decomposition are arbitrary.
    """
    dimensions = min(dimensions, *rows.shape)
    centred = rows - rows.mean(axis=0, keepdims=True, dtype=np.float32)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    largest = np.abs(right[:dimensions]).argmax(axis=1)
    signs = np.sign(right[np.arange(dimensions), largest])
    variances = np.square(singular)
    points = left[:, :dimensions] * singular[:dimensions] * signs
    total = np.maximum(variances.sum(dtype=np.float32), np.finfo(np.float32).tiny)
    return points.astype(np.float32), (variances[:dimensions] / total).astype(np.float32)


def tsne(rows: Float32[np.ndarray, "tokens d_model"]) -> Float32[np.ndarray, "tokens 2"]:
    """Return the coordinates of t-SNE, from the first 50 principal components.

    Raises InvalidRequestError where scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise InvalidRequestError(
            "t-SNE needs scikit-learn; pip install 'nanovllm[visualize]', or use pca",
            param="method",
        ) from None
    inputs, _ = pca(rows, _TSNE_INPUTS)
    perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        projection = TSNE(
            n_components=2,
            perplexity=perplexity,
            init="pca",
            random_state=_SEED,
            n_jobs=1,
        )
        points: np.ndarray = projection.fit_transform(inputs)
    return points.astype(np.float32)


def neighbors(model: InspectedModel, token_id: int, count: int = 10) -> list[tuple[int, float]]:
    """Return the tokens with the largest cosine to a token's embedding, without the token itself.

    Raises InvalidRequestError if the token is unknown, or `count` is not 1 to MAX_NEIGHBORS.
    """
    model.check_token(token_id, "token")
    if not 1 <= count <= MAX_NEIGHBORS:
        raise InvalidRequestError(
            f"count is {count} but must be 1 to {MAX_NEIGHBORS}", param="count"
        )
    (found,) = nearest(model, [token_id], count)
    return found


def nearest(
    model: InspectedModel, token_ids: Sequence[int], count: int
) -> list[list[tuple[int, float]]]:
    """Return the `count` nearest tokens of each token with their cosines, nearest first."""
    table = model.weights.token_embedding
    count = min(count, len(table) - 1)
    lengths = np.sqrt(np.einsum("vd,vd->v", table, table))
    lengths = np.maximum(lengths, np.finfo(np.float32).tiny)
    found = []
    for start in range(0, len(token_ids), 64):
        chunk = np.array(token_ids[start : start + 64], dtype=np.int64)
        cosines = (table[chunk] / lengths[chunk, None]) @ table.T
        cosines /= lengths
        cosines[np.arange(len(chunk)), chunk] = -np.inf  # the token itself
        for row in cosines:
            best = np.argpartition(-row, count - 1)[:count]
            best = best[np.lexsort((best, -row[best]))]
            found.append(list(zip(best.tolist(), row[best].tolist(), strict=True)))
    return found
