"""
# Train a transformer

A small GPT learns to spell from fairy tales, character by character, in less than a minute. You
compute what its loss must be before the first update, watch how it falls, and read what the model
writes on the way.

It needs no network: the tales come with nanovllm.
"""

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from nanovllm import LLM, SamplingParams, Trainer, TrainingConfig
from nanovllm.learn.texts import grimm
from nanovllm.training.metrics import Evaluation, Update

# %% [markdown]
# ## The data
#
# The text is the first tales of the brothers Grimm. A part of its end is kept back: the model never
# learns from it, so the loss there, the *validation loss*, shows what it can do with new text.

# %%
text = grimm()
folder = Path(tempfile.mkdtemp())
(folder / "tales.txt").write_text(text, encoding="utf-8")
print(f"{len(text):,} characters, {len(set(text))} different ones. They begin:\n\n{text[:230]} ...")

# %% [markdown]
# ## The network
#
# A token is a character here. The network has one layer of three heads, and each token is a row of
# 96 numbers. It sees at most 48 characters at once, and each update learns from 12 such pieces.

# %%
config = TrainingConfig(
    data=folder / "tales.txt",
    output=folder / "run",
    tokenizer="char",
    layers=1,
    heads=3,
    width=96,
    context=48,
    batch_size=12,
    steps=400,
    eval_every=100,
    lr=6e-3,
    warmup_steps=100,
    sample_tokens=48,
)
trainer = Trainer(config)
vocab = trainer.setup.model.vocab
print(f"{trainer.num_parameters:,} parameters; {vocab} tokens")

# %% [markdown]
# ## The loss before the first update
#
# The loss is -ln p, in the mean, where p is the probability that the model gave to the character
# that really follows. A network that knows nothing gives each of V tokens the probability 1 / V.
# What is its loss? Compute it before you run the next cell, which trains.

# %%
updates: list[Update] = []
evaluations: list[Evaluation] = []
samples: list[str] = []


def on_evaluation(evaluation: Evaluation, sample: str | None) -> None:
    """Keep a measurement, and the text that the model wrote."""
    evaluations.append(evaluation)
    samples.append(sample or "")


trainer.train(on_evaluation=on_evaluation, on_step=updates.append)
validation = [evaluation.val_loss or 0.0 for evaluation in evaluations]
print(f"loss before the first update: {validation[0]:.2f}; ln V = {math.log(vocab):.2f}")
assert abs(validation[0] - math.log(vocab)) < 0.1

# %% [markdown]
# The loss of knowing nothing is -ln(1 / V) = ln V. A first loss far from it is the sign of a
# mistake in the network or in its first weights.
#
# ## How the loss falls

# %%
steps = [evaluation.step for evaluation in evaluations]
figure, axes = plt.subplots(figsize=(8, 4))
axes.plot(
    [update.step for update in updates],
    [update.train_loss or 0.0 for update in updates],
    linewidth=0.8,
    label="training: the pieces of one update",
)
axes.plot(steps, validation, "o-", label="validation: text that it never learns from")
axes.axhline(math.log(vocab), color="gray", linestyle=":", label="ln V: knows nothing")
axes.set_ylim(0)
axes.set_xlabel("updates")
axes.set_ylabel("loss, in nats per character")
axes.set_title("A transformer learns to spell")
axes.legend()
figure.tight_layout()
for step, loss in zip(steps, validation, strict=True):
    print(
        f"{step:3} updates: loss {loss:.1f}, like a choice among {math.exp(loss):4.1f} characters"
    )
assert validation[-1] < validation[0] - 2

# %% [markdown]
# The loss falls fastest in the beginning, when the model learns which characters are frequent.
# Which letter follows which is harder, and whole words are harder still. The last number of each
# line is e to the power of the loss, the *perplexity*.
#
# ## What the model writes
#
# After each hundred updates, the model continues the same beginning.

# %%
for step, sample in zip(steps, samples, strict=True):
    print(f"{step:3} updates: {' '.join(sample.split())}")

# %% [markdown]
# At first any character is as good as any other. Then letters and spaces come as often as in the
# tales, then short words such as "the" and "and" are right. Longer training, more text and a larger
# network bring longer words and grammar: the bundled model comes from the same training loop.
#
# ## Use it
#
# The run's folder is a checkpoint like any other. `nanovllm serve FOLDER/run` serves it. Here it is
# in Python:

# %%
params = SamplingParams(max_tokens=36, temperature=0.5, seed=1)
for prompt in ("The king", "She was"):
    output = LLM(folder / "run").generate(prompt, params, use_tqdm=False)[0].outputs[0]
    print(f"{prompt}{output.text}")

# %% [markdown]
# ## Go on
#
# - Change one setting, such as `lr`, `heads` or `steps`, and run all cells again. Is it better?
# - Write the backward pass and AdamW yourself: `nanovllm learn show 11`.
# - Train on your own text: `nanovllm train FILE`.
