"""The figures of docs/tutorials/todays-models.md, from the public configurations of six models.

The sizes are those of each model's config.json. Their numbers of parameters, which the formulas
below give, are equal to the published ones (tests/docs/test_tutorials.py).
"""

import math
from dataclasses import dataclass

from nanovllm.cli.svg import picture, text
from tools.tutorials.drawing import STYLE
from tools.tutorials.pages import Tutorial, code, table

PAGE = "todays-models.md"
_BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a decoder, and in what it differs from Llama."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab: int
    context: int
    window: int | None = None
    is_gpt2: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    is_tied: bool = True

    @property
    def num_parameters(self) -> int:
        """Number of all weights, biases and gains."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        ffn = self.width * self.ffn_width * (2 if self.is_gpt2 else 3)
        others = 2 * self.width  # the gains of two norms
        if self.is_gpt2:
            others += 2 * self.width + self.linear_biases
        if self.has_qkv_bias:
            others += self.head_dim * (self.heads + 2 * self.kv_heads)
        if self.has_qk_norm:
            others += 2 * self.head_dim
        outside = self.embedding * (1 if self.is_tied else 2) + self.width
        if self.is_gpt2:
            outside += self.width + self.context * self.width
        return self.layers * (attention + ffn + others) + outside

    @property
    def linear_biases(self) -> int:
        """Number of biases of a GPT-2 block's four matrices."""
        return 5 * self.width + self.ffn_width

    @property
    def embedding(self) -> int:
        """Number of weights of the token embedding."""
        return self.vocab * self.width

    def kv_bytes(self, kv_heads: int | None = None) -> int:
        """Return the bytes of a token's keys and values in bfloat16, or with other key heads."""
        heads = self.kv_heads if kv_heads is None else kv_heads
        return 2 * self.layers * heads * self.head_dim * _BFLOAT16_BYTES


GPT2 = Model("GPT-2 124M", 12, 768, 12, 12, 64, 3072, 50257, 1024, is_gpt2=True)
SMOLLM2 = Model("SmolLM2 135M", 30, 576, 9, 3, 64, 1536, 49152, 8192)
QWEN2 = Model("Qwen2.5 0.5B", 24, 896, 14, 2, 64, 4864, 151936, 32768, has_qkv_bias=True)
QWEN3 = Model("Qwen3 0.6B", 28, 1024, 16, 8, 128, 3072, 151936, 40960, has_qk_norm=True)
LLAMA = Model("Llama 3.2 1B", 16, 2048, 32, 8, 64, 8192, 128256, 131072)
MISTRAL = Model("Mistral 7B", 32, 4096, 32, 8, 128, 14336, 32000, 32768, window=4096, is_tied=False)
MODELS = (GPT2, SMOLLM2, QWEN2, QWEN3, LLAMA, MISTRAL)


def tutorial() -> Tutorial:
    """Return the contents of the page."""
    row = (1.0, 0.0, 2.0)
    rms = math.sqrt(sum(x * x for x in row) / len(row))
    gate, up = 2.0, 3.0
    silu = gate / (1 + math.exp(-gate))
    window_bytes = (MISTRAL.window or 0) * MISTRAL.kv_bytes()
    parts = {
        "sizes": _sizes(),
        "norms": code(
            [
                f"row           {_row(row)}",
                f"layer norm    {_row(_layer_norm(row))}      mean 1, deviation 0.816",
                f"RMS norm      {_row(tuple(x / rms for x in row))}      root mean square 1.291",
            ]
        ),
        "rotary": _rotary_table(),
        "cache": _cache_table(),
    }
    facts = (
        f"silu({gate:g}) * {up:g} = {silu:.3f} * {up:g} = {silu * up:.3f}",
        f"{GPT2.context * GPT2.width:,} weights",
        f"{SMOLLM2.ffn_width} = 8/3 * {SMOLLM2.width}",
        f"{3 * SMOLLM2.width * SMOLLM2.ffn_width:,}",
        f"{GPT2.layers * GPT2.linear_biases:,} biases",
        f"{100 * GPT2.layers * GPT2.linear_biases / GPT2.num_parameters:.2f}%",
        f"sqrt({QWEN3.head_dim}) = {math.sqrt(QWEN3.head_dim):.1f}",
        f"{window_bytes / 2**20:.0f} MiB",
        f"{MISTRAL.context * MISTRAL.kv_bytes() / 2**30:.0f} GiB",
        f"{MISTRAL.layers * (MISTRAL.window or 0):,}",
        f"{QWEN2.embedding / 1e6:.0f} of its {QWEN2.num_parameters / 1e6:.0f} million",
    )
    pictures = {"kv-cache-bytes.svg": _cache_picture(), "rotary.svg": _rotary_picture()}
    return Tutorial(PAGE, parts, facts, pictures)


def _layer_norm(row: tuple[float, ...]) -> tuple[float, ...]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    return tuple((x - mean) / deviation for x in row)


def _row(row: tuple[float, ...]) -> str:
    return "[" + " ".join(f"{x:6.3f}" for x in row) + "]"


def _sizes() -> str:
    """Return a table with a column for each model."""
    sizes = {
        "layers": [model.layers for model in MODELS],
        "width (d_model)": [model.width for model in MODELS],
        "query heads": [model.heads for model in MODELS],
        "key heads": [model.kv_heads for model in MODELS],
        "head_dim": [model.head_dim for model in MODELS],
        "feed-forward width": [model.ffn_width for model in MODELS],
        "vocabulary": [model.vocab for model in MODELS],
        "context": [model.context for model in MODELS],
        "parameters, millions": [round(model.num_parameters / 1e6) for model in MODELS],
    }
    rows = [[name, *(f"{size:,}" for size in row)] for name, row in sizes.items()]
    return table(["", *(model.name for model in MODELS)], rows)


def _cache_table() -> str:
    rows = [
        [
            model.name,
            f"2 * {model.layers} * {model.kv_heads} * {model.head_dim} * {_BFLOAT16_BYTES}",
            f"{model.kv_bytes():,}",
            f"{model.kv_bytes(model.heads):,}",
            f"{model.heads // model.kv_heads}",
        ]
        for model in MODELS
    ]
    head = ["", "2 * layers * key heads * head_dim * bytes", "bytes per token"]
    return table([*head, "with a key head per query head", "saves a factor of"], rows)


def _rotary_table() -> str:
    """Return scores of a query and a key, both (1, 0), rotated by 30 degrees per position."""
    rows = []
    for query, key in ((5, 3), (105, 103), (5, 5), (5, 2), (8, 2)):
        angles = [math.radians(30 * position) for position in (query, key)]
        (qx, qy), (kx, ky) = ((math.cos(angle), math.sin(angle)) for angle in angles)
        score = qx * kx + qy * ky
        rows.append([str(query), str(key), str(query - key), f"{score + 1e-12:.3f}"])
    return table(["position of the query", "of the key", "distance", "q . k"], rows)


def _cache_picture() -> str:
    parts, y, left, longest = [], 64, 130, 440
    largest = max(model.kv_bytes(model.heads) for model in MODELS if model is not MISTRAL)
    for model in MODELS:
        if model is MISTRAL:
            continue
        parts.append(text(16, y + 14, model.name))
        for row, (count, kind) in enumerate(
            ((model.kv_bytes(), "bar ours"), (model.kv_bytes(model.heads), "bar"))
        ):
            width, top = round(longest * count / largest), y + 16 * row
            parts.append(
                f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="13" rx="2"/>'
            )
            parts.append(text(left + width + 6, top + 11, f"{count:,}", "value"))
        y += 46
    parts.append(
        text(16, y + 6, "blue: as it is; grey: with a key head for each query head", "note")
    )
    return picture("KV cache in bytes per token (bfloat16)", 660, y + 24, parts, STYLE)


def _rotary_picture() -> str:
    parts = []
    for column, (query, key) in enumerate(((5, 3), (8, 6), (5, 2))):
        x, y, radius = 120 + 210 * column, 150, 80
        parts.append(f'<circle cx="{x}" cy="{y}" r="{radius}" class="empty"/>')
        for name, position, kind in (("q", query, "one"), ("k", key, "two")):
            angle = math.radians(30 * position)
            dx, dy = radius * math.cos(angle), -radius * math.sin(angle)
            parts.append(f'<path class="{kind}" d="M{x} {y}L{x + dx:.1f} {y + dy:.1f}"/>')
            parts.append(text(x + 1.16 * dx, y + 1.16 * dy + 4, name, "strong", "middle"))
        score = math.cos(math.radians(30 * (query - key)))
        parts.append(text(x, 262, f"positions {query} and {key}", "", "middle"))
        parts.append(text(x, 280, f"q . k = {score + 1e-12:.3f}", "value", "middle"))
    return picture("Rotary positions: only the distance counts", 660, 296, parts, STYLE)
