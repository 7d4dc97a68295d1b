"""GPT2Config: the sizes and options of a network, from its config.json.

Hugging Face's names are n_embd (d_model), n_layer (layers), n_head (heads), n_inner (d_ff) and
n_positions (max_positions).
"""

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.errors import CheckpointError, printable
from nanovllm.model.activation import ACTIVATIONS

_LARGEST = {
    "vocab": 2**24,
    "max_positions": 2**24,
    "d_model": 2**17,
    "layers": 2**10,
    "heads": 2**14,
    "d_ff": 2**20,
}
"""Limits far above any GPT-2: a wrong config is refused before memory runs out."""
_UNSUPPORTED = {
    "add_cross_attention": "the forward pass has no cross-attention; use a model without it",
    "quantization_config": "weights are read as float32, float16 or bfloat16; give the checkpoint "
    "from before its quantization (--quantization int8 quantizes it on load)",
    "pruned_heads": "every layer has all of its heads; give the checkpoint from before the pruning",
}
"""Fields of config.json that change the network, and why a value other than none is refused."""

POSITIONS = ("learned", "sinusoidal")
"""Kinds of position embeddings."""
ABLATIONS = ("positions", "layer-norm", "residual", "ffn", "causal-mask", "scaling")
"""Parts that a network can be trained without."""
_EXPRESSIBLE = {"positions", "ffn", "scaling"}
"""Those whose absence GPT-2 can express: weights of 0, and scale_attn_weights."""
ABLATED = "ablated-gpt2"
"""The model_type of other networks, so that no program takes them for GPT-2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2Config:
    """Sizes and options of a GPT-2 network; CheckpointError lists everything that is wrong.

    Attributes:
        d_ff: width of the feed-forward block's hidden layer.
        epsilon: added to the variance in layer norms.
        scale_attn_weights: divide attention scores by sqrt(head_dim).
        scale_attn_by_inverse_layer_idx: also divide them by the layer's number, from 1 (used in
            Mistral's GPT-2 training).
        tied_head: the output head is the token embedding.
        positions: one of POSITIONS; training keeps a "sinusoidal" position embedding constant. A
            forward pass reads the embedding from the checkpoint in any case.
        eos_token_ids: tokens that end a text.
        ablated: parts of ABLATIONS that the network lacks.
    """

    vocab: int
    max_positions: int
    d_model: int
    layers: int
    heads: int
    d_ff: int
    epsilon: float = 1e-5
    activation: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tied_head: bool = True
    positions: str = "learned"
    eos_token_ids: tuple[int, ...] = ()
    ablated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {_shown(getattr(self, name))} but must be an integer from 1 to {limit}"
            for name, limit in _LARGEST.items()
            if not _is_whole(getattr(self, name)) or not 1 <= getattr(self, name) <= limit
        ]
        if not problems and self.d_model % self.heads:
            problems.append(
                f"d_model (n_embd) is {self.d_model}, which {self.heads} heads do not divide"
            )
        if (
            isinstance(self.epsilon, bool)
            or not isinstance(self.epsilon, int | float)
            or not 0 < self.epsilon < math.inf
        ):
            problems.append(
                f"layer_norm_epsilon is {_shown(self.epsilon)} but must be a number above 0"
            )
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            problems.append(
                f"activation_function is {_shown(self.activation)} but must be one of "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )
        if self.positions not in POSITIONS:
            problems.append(
                f"position_embedding is {_shown(self.positions)} but must be one of "
                f"{', '.join(POSITIONS)}"
            )
        problems += [
            f"{name} is {_shown(getattr(self, name))} but must be true or false"
            for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tied_head")
            if not isinstance(getattr(self, name), bool)
        ]
        if not isinstance(self.ablated, tuple) or not set(self.ablated) <= set(ABLATIONS):
            problems.append(
                f"ablated is {_shown(self.ablated)} but must be some of {', '.join(ABLATIONS)}"
            )
        if problems:
            raise CheckpointError("config.json cannot be used:\n  " + "\n  ".join(problems))

    @property
    def is_gpt2(self) -> bool:
        """Whether GPT-2's forward pass computes the network, in spite of what it lacks."""
        return set(self.ablated) <= _EXPRESSIBLE

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.heads

    @property
    def num_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        per_layer = (
            4 * self.d_model**2 + 2 * self.d_model * self.d_ff + 9 * self.d_model + self.d_ff
        )
        embeddings = (self.vocab * (1 if self.tied_head else 2) + self.max_positions) * self.d_model
        return embeddings + self.layers * per_layer + 2 * self.d_model

    def attention_scale(self, layer: int) -> float:
        """Return the factor of the attention scores of `layer`, counted from 0."""
        scale = 1.0 / math.sqrt(self.head_dim) if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, may_be_ablated: bool = False) -> "GPT2Config":
        """Read a parsed config.json; raise CheckpointError for another architecture.

        `may_be_ablated` allows a network that GPT-2's forward pass does not compute.
        """
        architecture = raw.get("model_type")
        if architecture == ABLATED and not may_be_ablated:
            raise CheckpointError(
                f"this network was trained without its {_listed(raw.get('ablated'))} (nanovllm "
                "train --ablate), so GPT-2's forward pass does not compute it; samples.jsonl and "
                "report.html in the folder of its run show what it writes"
            )
        if architecture not in ("gpt2", ABLATED):
            listed = raw.get("architectures")
            classes = (
                [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
            )
            named = printable(architecture) if isinstance(architecture, str) else ""
            kind = f" ({printable(', '.join(classes))})" if classes else ""
            raise CheckpointError(
                f"this is a {named or 'nameless'} model{kind}; only the gpt2 architecture can be "
                "loaded"
            )
        refused = [
            f"{name} is {_shown(raw[name])}: {reason}"
            for name, reason in _UNSUPPORTED.items()
            if raw.get(name) not in (None, False, {})
        ]
        if refused:
            raise CheckpointError("config.json cannot be used:\n  " + "\n  ".join(refused))
        missing = [
            name for name in ("vocab_size", "n_embd", "n_layer", "n_head") if name not in raw
        ]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        d_model, d_ff = raw["n_embd"], raw.get("n_inner")
        return cls(
            vocab=raw["vocab_size"],
            max_positions=raw.get("n_positions", raw.get("n_ctx", 1024)),
            d_model=d_model,
            layers=raw["n_layer"],
            heads=raw["n_head"],
            d_ff=d_ff if d_ff is not None else 4 * d_model if _is_whole(d_model) else 0,
            epsilon=raw.get("layer_norm_epsilon", 1e-5),
            activation=raw.get("activation_function", "gelu_new"),
            scale_attn_weights=raw.get("scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=raw.get("scale_attn_by_inverse_layer_idx", False),
            tied_head=raw.get("tie_word_embeddings", True),
            positions=raw.get("position_embedding", "learned"),
            eos_token_ids=_token_ids(raw.get("eos_token_id")),
            ablated=tuple(raw["ablated"]) if isinstance(raw.get("ablated"), list) else (),
        )

    @classmethod
    def load(cls, folder: Path, *, may_be_ablated: bool = False) -> "GPT2Config":
        """Read a model folder's config.json, and end-of-text ids of generation_config.json too."""
        raw = read_json(folder / "config.json")
        config = cls.from_dict(raw, may_be_ablated=may_be_ablated)
        more = _token_ids(load_generation_config(folder).get("eos_token_id"))
        ids = tuple(i for i in dict.fromkeys(config.eos_token_ids + more) if 0 <= i < config.vocab)
        return replace(config, eos_token_ids=ids)


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
            f"{path.parent} has no {path.name}; name a folder with a GPT-2 checkpoint in Hugging "
            "Face format"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} but must hold an object")
    return value


def _shown(value: object) -> str:
    """Return an untrusted value as text, shortened and without control characters."""
    return printable(reprlib.repr(value))


def _listed(value: object) -> str:
    """Return a list of texts as text."""
    return printable(", ".join(map(str, value))) if isinstance(value, list) else "parts"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(value: object) -> tuple[int, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(item for item in items if isinstance(item, int) and not isinstance(item, bool))
