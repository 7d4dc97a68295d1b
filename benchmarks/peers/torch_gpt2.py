"""GPT-2 in plain PyTorch modules, as nanoGPT has it: what nanovllm's training is compared with."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training_worker import BETAS, LEARNING_RATE, WEIGHT_DECAY, Setting


class Block(nn.Module):
    """Attention and feed-forward, each on a residual branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn_in, self.ffn_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the residual stream [batch, context, width] after this block."""
        batch, context, width = hidden.shape
        query, key, value = (
            part.view(batch, context, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.ln_1(hidden)).split(width, dim=2)
        )
        attn = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attn_out(attn.transpose(1, 2).reshape(batch, context, width))
        ffn_hidden = functional.gelu(self.ffn_in(self.ln_2(hidden)), approximate="tanh")
        return hidden + self.ffn_out(ffn_hidden)


class GPT2(nn.Module):
    """GPT-2 with a tied head; the initial weights are drawn as GPT-2's are."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.wte = nn.Embedding(setting.vocab, setting.width)
        self.wpe = nn.Embedding(setting.context, setting.width)
        blocks = (Block(setting.width, setting.heads) for _ in range(setting.layers))
        self.blocks = nn.ModuleList(blocks)
        self.ln_f = nn.LayerNorm(setting.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("attn_out.weight", "ffn_out.weight"))
                std = 0.02 / math.sqrt(2 * setting.layers) if is_residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets [batch, context]."""
        hidden = self.wte(token_ids) + self.wpe.weight[: token_ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.ln_f(hidden) @ self.wte.weight.T
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model: GPT2) -> torch.optim.Optimizer:
    """Return AdamW; matrices decay, but biases, gains and positions do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.dim() == 2 and not name.startswith("wpe.")].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": WEIGHT_DECAY},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        fused=True,
    )
