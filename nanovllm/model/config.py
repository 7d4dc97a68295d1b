"""ModelConfig: all that other parts may ask of a network, whatever its family.

A family (families/) reads it from its config.json. Sizes have one name here; Hugging Face's differ
by family: n_embd or hidden_size is d_model, n_layer or num_hidden_layers is layers.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nanovllm.errors import CheckpointError, printable
from nanovllm.model.activation import ACTIVATIONS, GATES
from nanovllm.model.rotary import Rotary

_LARGEST = {
    "vocab": 2**24,
    "max_positions": 2**24,
    "d_model": 2**17,
    "layers": 2**10,
    "heads": 2**14,
    "d_ff": 2**20,
    "kv_heads": 2**14,
    "head_dim": 2**12,
}
"""Limits far above what a CPU serves: a wrong config is refused before memory runs out."""
_DERIVED = ("kv_heads", "head_dim")
"""Sizes that other sizes give if they are 0."""

NORMS = ("layer", "rms")
"""Kinds of norms."""
EMBEDDED_POSITIONS = ("learned", "sinusoidal")
"""Kinds of position embeddings."""
POSITIONS = (*EMBEDDED_POSITIONS, "rotary")
"""Kinds of positions."""
ABLATIONS = ("positions", "layer-norm", "residual", "ffn", "causal-mask", "scaling")
"""Parts that a network can be trained without."""
_EXPRESSIBLE = {"positions", "ffn", "scaling"}
"""Those whose absence GPT-2 can express: weights of 0, and scale_attn_weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a decoder; CheckpointError lists everything that is wrong.

    The defaults are those of GPT-2.

    Attributes:
        family: the family that computes it, a name in families/.
        kv_heads: heads of keys and values; each is shared by heads / kv_heads query heads (grouped
            queries, Ainslie et al. 2023, arXiv:2305.13245). 0 stands for `heads`.
        head_dim: width of one head; 0 stands for d_model / heads.
        d_ff: width of the feed-forward block's hidden layer.
        norm: one of NORMS.
        epsilon: added to the variance in norms.
        activation: name of the feed-forward block's activation function.
        is_gated: the feed-forward block is activation(x @ gate) * (x @ up) @ down.
        biased: linear layers that have a bias, of "qkv", "out" and "ffn".
        has_query_norm: queries and keys have an RMS norm for each head.
        scale_attn_weights: divide attention scores by sqrt(head_dim).
        scale_attn_by_inverse_layer_idx: also divide them by the layer's number, from 1 (used in
            Mistral's GPT-2 training).
        window: a token sees this many tokens, itself among them; None for all.
        tied_head: the output head is the token embedding.
        positions: one of POSITIONS; training keeps a "sinusoidal" position embedding constant. A
            forward pass reads the embedding from the checkpoint in any case.
        rotary: the angles of "rotary" positions; None for other kinds.
        eos_token_ids: tokens that end a text.
        ablated: parts of ABLATIONS that the network lacks.
    """

    vocab: int
    max_positions: int
    d_model: int
    layers: int
    heads: int
    d_ff: int
    family: str = "gpt2"
    kv_heads: int = 0
    head_dim: int = 0
    norm: str = "layer"
    epsilon: float = 1e-5
    activation: str = "gelu_new"
    is_gated: bool = False
    biased: frozenset[str] = frozenset({"qkv", "out", "ffn"})
    has_query_norm: bool = False
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    window: int | None = None
    tied_head: bool = True
    positions: str = "learned"
    rotary: Rotary | None = None
    eos_token_ids: tuple[int, ...] = ()
    ablated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {shown(getattr(self, name))} but must be an integer from 1 to {limit}"
            for name, limit in _LARGEST.items()
            if not (name in _DERIVED and getattr(self, name) == 0)
            and not (is_whole(getattr(self, name)) and 1 <= getattr(self, name) <= limit)
        ] or self._set_heads()
        if not is_positive(self.epsilon):
            problems.append(
                f"layer_norm_epsilon is {shown(self.epsilon)} but must be a number above 0"
            )
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            problems.append(
                f"activation_function is {shown(self.activation)} but must be one of "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )
        elif self.is_gated and ACTIVATIONS[self.activation].name not in GATES:
            problems.append(f"the gate is {self.activation} but must be one of {', '.join(GATES)}")
        for name, kinds in (("norm", NORMS), ("positions", POSITIONS)):
            if getattr(self, name) not in kinds:
                problems.append(
                    f"{name} is {shown(getattr(self, name))} but must be one of {', '.join(kinds)}"
                )
        flags = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tied_head")
        problems += [
            f"{name} is {shown(getattr(self, name))} but must be true or false"
            for name in flags
            if not isinstance(getattr(self, name), bool)
        ]
        if self.window is not None and not (is_whole(self.window) and self.window > 0):
            problems.append(
                f"sliding_window is {shown(self.window)} but must be an integer above 0"
            )
        if not isinstance(self.ablated, tuple) or any(one not in ABLATIONS for one in self.ablated):
            problems.append(
                f"ablated is {shown(self.ablated)} but must be some of {', '.join(ABLATIONS)}"
            )
        if problems:
            raise refusal(problems)

    def _set_heads(self) -> list[str]:
        """Set what is derived from other sizes; return what is wrong with the heads."""
        problems = []
        if self.head_dim == 0 and self.d_model % self.heads:
            problems.append(
                f"d_model (n_embd) is {self.d_model}, which {self.heads} heads do not divide"
            )
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or max(1, self.d_model // self.heads))
        if self.heads % self.kv_heads:
            problems.append(
                f"heads is {self.heads}, which {self.kv_heads} heads of keys and values "
                "(num_key_value_heads) do not divide"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            problems.append(
                f"head_dim is {self.head_dim}, but rotary positions turn pairs of numbers; it must "
                "be even"
            )
        return problems

    @property
    def is_gpt2(self) -> bool:
        """Whether GPT-2's forward pass computes the network, in spite of what it lacks."""
        return self.family == "gpt2" and set(self.ablated) <= _EXPRESSIBLE

    @property
    def queries_width(self) -> int:
        """Width of all queries of a token, and of the attention's output."""
        return self.heads * self.head_dim

    @property
    def keys_width(self) -> int:
        """Width of all keys of a token, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Width of all queries, keys and values of a token."""
        return self.queries_width + 2 * self.keys_width

    @property
    def up_width(self) -> int:
        """Columns of the feed-forward block's first linear layer."""
        return (2 if self.is_gated else 1) * self.d_ff

    @property
    def block_weights(self) -> int:
        """Weights of a block's linear layers, without biases."""
        return self.d_model * (self.qkv_width + self.queries_width + self.up_width + self.d_ff)

    @property
    def block_vectors(self) -> int:
        """Numbers in a block's biases and norms."""
        widths = {"qkv": self.qkv_width, "out": self.d_model, "ffn": self.up_width + self.d_model}
        norms = (4 if self.norm == "layer" else 2) * self.d_model
        norms += 2 * self.head_dim if self.has_query_norm else 0
        return norms + sum(widths[name] for name in self.biased)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        per_layer, norm = self.block_weights + self.block_vectors, self.d_model
        norm *= 2 if self.norm == "layer" else 1
        embeddings = self.vocab * (1 if self.tied_head else 2)
        embeddings += 0 if self.positions == "rotary" else self.max_positions
        return embeddings * self.d_model + self.layers * per_layer + norm

    def attention_scale(self, layer: int) -> float:
        """Return the factor of the attention scores of `layer`, counted from 0."""
        scale = 1.0 / math.sqrt(self.head_dim) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def load_generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json, the author's sampling defaults; empty if there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise CheckpointError with the file's name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; name a folder with a checkpoint in Hugging Face "
            "format"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} but must hold an object")
    return value


def refusal(problems: list[str]) -> CheckpointError:
    """Return the error that lists what is wrong with a config.json."""
    return CheckpointError("config.json cannot be used:\n  " + "\n  ".join(problems))


def check_fields(
    raw: Mapping[str, Any], needed: tuple[str, ...], unsupported: Mapping[str, str]
) -> None:
    """Raise CheckpointError for fields that are missing, or set though they are unsupported.

    Args:
        raw: a parsed config.json.
        needed: names of its fields that have no default.
        unsupported: fields that change the network, each with the reason why a value other than
            none is refused.
    """
    refused = [
        f"{name} is {shown(raw[name])}: {reason}"
        for name, reason in unsupported.items()
        if raw.get(name) not in (None, False, {})
    ]
    if refused:
        raise refusal(refused)
    missing = [name for name in needed if name not in raw]
    if missing:
        raise CheckpointError(f"config.json lacks {', '.join(missing)}")


def token_ids_of(value: object) -> tuple[int, ...]:
    """Return the token ids in a field that holds one, a list of them, or none."""
    items = value if isinstance(value, list) else [value]
    return tuple(item for item in items if is_whole(item))


def shown(value: object) -> str:
    """Return an untrusted value as text, shortened and without control characters."""
    return printable(reprlib.repr(value))


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: object) -> bool:
    """Whether a value of JSON is a number above 0 that float32 has, in all its digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 2.0**-126 <= value < 2.0**128
