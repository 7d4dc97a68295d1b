"""
# Train a transformer

A small GPT learns the letters of a text, then its shortest words, in less than a minute. You see
what the loss must be before the first update, how it falls, and what the model writes on the way.
"""

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from nanovllm import LLM, SamplingParams, Trainer, TrainingConfig
from nanovllm.training.metrics import Evaluation, Update

# %% [markdown]
# ## The data
#
# Any text will do. So that this notebook needs no network, the bundled model writes it: the pupil
# learns from a teacher's stories.

# %%
prompts = ["Once upon a time", "The old man said", "She was a little girl", "In the morning"] * 6
settings = [
    SamplingParams(max_tokens=400, temperature=0.8, top_p=0.95, seed=seed, ignore_eos=True)
    for seed in range(len(prompts))
]
stories = LLM().generate(prompts, settings, use_tqdm=False)
text = "\n\n".join(f"{story.prompt}{story.outputs[0].text}" for story in stories)
folder = Path(tempfile.mkdtemp())
(folder / "stories.txt").write_text(text, encoding="utf-8")
print(f"{len(text):,} characters of {len(set(text))} kinds\n\n{text[:300]}")
assert len(text) > 20_000

# %% [markdown]
# ## Before the first update
#
# Here a token is a character. A network that knows nothing gives each of V tokens the probability
# 1 / V, and its loss is -ln(1 / V) = ln V. Compute it before you run the next cell: what will the
# loss of step 0 be?

# %%
config = TrainingConfig(
    data=folder / "stories.txt",
    output=folder / "run",
    tokenizer="char",
    layers=2,
    heads=4,
    width=64,
    context=96,
    batch_size=12,
    steps=240,
    eval_every=60,
    lr=3e-3,
    sample_tokens=80,
)
updates: list[Update] = []
samples: list[tuple[Evaluation, str | None]] = []
trainer = Trainer(config)
trainer.train(
    on_evaluation=lambda evaluation, sample: samples.append((evaluation, sample)),
    on_step=updates.append,
)
first = samples[0][0].val_loss or 0.0
knows_nothing = math.log(trainer.setup.model.vocab)
print(f"loss of step 0: {first:.3f}; ln V = {knows_nothing:.3f}")
assert abs(first - knows_nothing) < 0.1

# %% [markdown]
# ## What it learns first

# %%
for evaluation, sample in samples:
    print(f"--- step {evaluation.step}, validation loss {evaluation.val_loss:.3f}\n{sample}\n")

# %% [markdown]
# Letters in the right proportions come first, then the lengths of words, then "the" and "he". More
# steps and more text bring real words, and a larger model brings grammar.

# %%
figure, axes = plt.subplots(figsize=(7, 4))
losses = [(update.step, update.train_loss or 0.0) for update in updates]
axes.plot(*zip(*losses, strict=True), label="training")
steps = [evaluation.step for evaluation, _ in samples]
axes.plot(
    steps, [evaluation.val_loss or 0.0 for evaluation, _ in samples], "o-", label="validation"
)
axes.axhline(first, color="gray", linestyle=":", label="ln V: knows nothing")
axes.set_xlabel("step")
axes.set_ylabel("loss in nats per character")
axes.set_title("A transformer learns to write")
axes.legend()
assert (samples[-1][0].val_loss or 9.0) < first - 1.2

# %% [markdown]
# ## Serve it
#
# The run is a checkpoint like any other: `nanovllm serve FOLDER/run`, or in Python:

# %%
params = SamplingParams(max_tokens=60, temperature=0.5, seed=3)
print(LLM(folder / "run").generate("Once upon", params, use_tqdm=False)[0].outputs[0].text)

# %% [markdown]
# ## Go on
#
# Write the backward pass and AdamW yourself: `nanovllm learn show 11`.
