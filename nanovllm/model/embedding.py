"""Token and position embeddings: where the residual stream begins."""

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.weights import GPT2Weights


def embed(
    weights: GPT2Weights,
    token_ids: Int64[np.ndarray, " tokens"],
    positions: Int64[np.ndarray, " tokens"],
) -> Float32[np.ndarray, "tokens d_model"]:
    """The sum of each token's embedding and its position's."""
    hidden: Float32[np.ndarray, "tokens d_model"] = weights.token_embedding[token_ids]
    hidden += weights.position_embedding[positions]
    return hidden
