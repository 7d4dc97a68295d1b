"""Memory of an inspection, computed from the sizes of the model before it runs.

The figures are upper bounds of the arrays and objects that depend on the request, at their peak.
The model's own memory, the embeddings and the layers in use, is not among them.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.attention import MAX_WEIGHTS_BYTES, packed_weights_bytes
from nanovllm.inspection.embeddings import DEFAULT_POINTS
from nanovllm.inspection.logit_lens import CHUNK_ROWS, DEFAULT_TOP
from nanovllm.model.ablation import parts_of
from nanovllm.model.checkpoint import expected_shapes
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import family_of

MAX_MEMORY_BYTES = 1 << 30
"""Maximum memory of a request. `neighbors` needs less with the largest vocabulary."""
_POINT_BYTES = 1000  # of Python objects and JSON; of each point of a projection
_CELL_BYTES = 1500  # of each position and layer of the logit lens, without its top tokens
_TOP_TOKEN_BYTES = 900
_PART_BYTES = 1000  # of each part that is switched off
_NUMBER_BYTES = 80  # of a Python float, in its list and in the JSON
_REMEDIES = {
    "attention": ("prompt", "shorten the prompt, or ask for one layer"),
    "attention_head": ("prompt", "shorten the prompt"),
    "overview": ("prompt", "shorten the prompt"),
    "logit_lens": ("prompt", "shorten the prompt, or lower top"),
    "ablation": ("prompt", "shorten the prompt, or lower top"),
    "ablation_map": ("prompt", "shorten the prompt"),
    "embeddings": ("limit", "lower limit"),
}


def check_memory(
    config: ModelConfig, name: str, arguments: Mapping[str, Any], max_bytes: int
) -> None:
    """Raise InvalidRequestError if a call of `responses.run` needs more than `max_bytes`.

    A prompt in `arguments` is a list of token ids.
    """
    num_bytes = request_bytes(config, name, arguments)
    if num_bytes > max_bytes:
        param, remedy = _REMEDIES[name]
        raise InvalidRequestError(
            f"the inspection needs {num_bytes} bytes of memory, the limit is {max_bytes}; {remedy}",
            param=param,
        )


def request_bytes(config: ModelConfig, name: str, arguments: Mapping[str, Any]) -> int:
    """Return the memory of a call of `responses.run`; 0 for `neighbors`, which is not limited."""
    if name == "neighbors":
        return 0
    if name == "embeddings":
        limit = arguments.get("limit", DEFAULT_POINTS)
        return _projection_bytes(config, limit, is_tsne=arguments.get("method") == "tsne")
    tokens = len(arguments["prompt"])
    num_bytes = _forward_bytes(config, tokens)
    if name == "attention":
        layers = config.layers if arguments.get("layer") is None else 1
        packed_bytes = min(packed_weights_bytes(config, tokens, layers), MAX_WEIGHTS_BYTES)
        # The weights and their base64 as bytes, as text and in the JSON. The weights of a layer
        # are indexed by the pairs of a query and a key.
        return num_bytes + 5 * packed_bytes + (4 * config.heads + 32) * tokens**2
    if name == "attention_head":
        numbers = 2 * tokens * config.head_dim + 2 * tokens
        return num_bytes + _NUMBER_BYTES * numbers
    if name == "overview":
        return num_bytes + 4 * 8 * config.heads * tokens**2  # four float64 arrays like the weights
    logits_bytes = (12 * min(CHUNK_ROWS, tokens) + 32) * config.vocab
    if name == "ablation_map":
        streams = 2 + len(parts_of(config))
        return num_bytes + logits_bytes + streams * (4 * tokens * config.d_model + _PART_BYTES)
    cells = (2 if name == "ablation" else config.layers + 1) * tokens
    cell_bytes = _CELL_BYTES + arguments.get("top", DEFAULT_TOP) * _TOP_TOKEN_BYTES
    return num_bytes + logits_bytes + cells * cell_bytes


def layers_bytes(config: ModelConfig) -> int:
    """Return the memory of layers during a forward pass: one in use, the next being read."""
    shapes, first = expected_shapes(config), f"{family_of(config).tensors.LAYERS}0."
    sizes = [4 * prod(shape) for name, shape in shapes.items() if name.startswith(first)]
    return 2 * sum(sizes) + max(sizes)  # a tensor of another type is converted to float32


def _forward_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the memory of keys, values and other arrays of a forward pass, in float32."""
    kv_cache = 2 * config.layers * tokens * config.keys_width
    hidden = tokens * (8 * config.d_model + 8 * config.queries_width + 6 * config.up_width)
    scores = (2 * config.heads + 2) * tokens**2  # weights and masks
    return 4 * (kv_cache + hidden + scores)


def _projection_bytes(config: ModelConfig, limit: int, *, is_tsne: bool) -> int:
    """Return the memory of the singular value decomposition, of t-SNE, and of the points."""
    rows, columns = min(limit, config.vocab), config.d_model
    rank = min(rows, columns)
    matrices = 6 * rows * columns + 3 * rank * (rows + columns) + 8 * rank**2  # with LAPACK's
    distances = 8 * rows**2 if is_tsne else 0
    return 4 * matrices + distances + rows * _POINT_BYTES
