"""
# Train a transformer

A small GPT learns the letters of a text, then its words, in less than a minute. You see what the
loss must be before the first update, how it falls, and what the model writes on the way.
"""

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from nanovllm import LLM, SamplingParams
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig

# %% [markdown]
# ## The data
#
# Any text will do. To need no network, the bundled model writes it: the pupil learns from a
# teacher's stories.

# %%
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=400, seed=1, ignore_eos=True)
prompts = ["Once upon a time", "The old man said", "She was a little girl", "In the morning"] * 8
teacher = LLM()
text = "\n\n".join(prompt + teacher_says.outputs[0].text for prompt, teacher_says in zip(
    prompts,
    teacher.generate(
        prompts, [SamplingParams(max_tokens=400, seed=seed, temperature=0.8, top_p=0.95)
                  for seed in range(len(prompts))],
        use_tqdm=False,
    ),
    strict=True,
))
folder = Path(tempfile.mkdtemp())
(folder / "stories.txt").write_text(text, encoding="utf-8")
print(f"{len(text):,} characters\n\n{text[:300]}")
assert len(text) > 20_000

# %% [markdown]
# ## Before the first update
#
# A network that knows nothing gives each of V tokens the probability 1 / V. Its loss is
# -ln(1 / V) = ln V. With one token a character, V is small. Guess the loss of step 0 before you go
# on.

# %%
config = TrainingConfig(
    data=folder / "stories.txt", output=folder / "run", tokenizer="char", layers=2, heads=4,
    width=96, context=96, batch_size=12, steps=300, eval_every=50, lr=3e-3, sample_tokens=80,
)
trainer = Trainer(config)
result = trainer.train()
