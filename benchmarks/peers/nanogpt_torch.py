"""Train a GPT-2 on the characters of a text with PyTorch, the recipe of nanogpt.py.

Run: python -m benchmarks.peers.nanogpt_torch input.txt '{"steps": 2000, ...}' --threads 2

The settings are those of examples/training/nanogpt-cpu.toml as JSON. As in nanoGPT, the training
split is the first 90% of the text and sequences begin at random characters of it. The validation
loss is the mean over the whole validation split, in which every character but the first is
predicted once. Every evaluation is a line of JSON.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.torch_gpt2 import GPT2, make_optimizer
from benchmarks.training_worker import Setting


def main() -> None:
    """Train and print the evaluations."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--threads", type=int, required=True)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    train(parsed.data.read_text(encoding="utf-8"), parsed.settings)


def train(text: str, settings: dict[str, Any]) -> None:
    """Train on the characters of a text."""
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text])
    boundary = int(0.9 * len(tokens))
    training, validation = tokens[:boundary], tokens[boundary:]
    context, batch_size = settings["context"], settings["batch_size"]
    setting = Setting(
        settings["layers"], settings["heads"], settings["width"], context, batch_size, len(ids)
    )
    torch.manual_seed(settings["seed"])
    model = GPT2(setting)
    optimizer = make_optimizer(model)
    elapsed_s, loss_sum, steps = 0.0, 0.0, settings["steps"]
    for step in range(steps + 1):
        if step % settings["eval_every"] == 0 or step == steps:
            report = {
                "step": step,
                "train_loss": loss_sum / settings["eval_every"] if step else None,
                "val_loss": validation_loss(model, validation, context, batch_size),
                "elapsed_s": elapsed_s,
            }
            print(json.dumps(report), flush=True)
            loss_sum = 0.0
        if step == steps:
            break
        started_s = time.perf_counter()
        starts = torch.randint(len(training) - context, (batch_size, 1))
        windows = training[starts + torch.arange(context + 1)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.item()
        elapsed_s += time.perf_counter() - started_s


def learning_rate(step: int, settings: dict[str, Any]) -> float:
    """Return the learning rate of an update: linear warmup, then a cosine."""
    peak, floor, warmup = settings["lr"], settings["min_lr"], settings["warmup_steps"]
    if step < warmup:
        return float(peak * (step + 1) / (warmup + 1))
    progress = (step - warmup) / (settings["steps"] - warmup)
    return float(floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor))


def validation_loss(model: GPT2, tokens: torch.Tensor, context: int, batch_size: int) -> float:
    """Return the mean loss of all tokens but the first, each predicted once."""
    predictions = len(tokens) - 1
    full = predictions // context * context
    inputs, targets = tokens[:-1], tokens[1:]
    total = 0.0
    with torch.no_grad():
        for start in range(0, full, batch_size * context):
            stop = min(full, start + batch_size * context)
            loss = model(
                inputs[start:stop].view(-1, context), targets[start:stop].view(-1, context)
            )
            total += loss.item() * (stop - start)
        if full < predictions:
            loss = model(inputs[None, full:], targets[None, full:])
            total += loss.item() * (predictions - full)
    return total / predictions


if __name__ == "__main__":
    main()
