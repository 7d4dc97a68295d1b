"""
# Attention from scratch

Tokens exchange something in one place of a transformer only. This notebook builds that place from a
dot product up, then looks at the heads of a model that was trained on books. It needs a minute and
no network; the model comes with the package.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

import nanovllm
from nanovllm.hub import resolve_model
from nanovllm.inspection.attention import attention_weights, head_statistics
from nanovllm.inspection.observe import InspectedModel

print("nanovllm", nanovllm.__version__)

# %% [markdown]
# ## A search in three vectors
#
# Each token has a *query* (what it looks for), a *key* (what it can be found by) and a *value*
# (what it hands over). The score of a query and a key is their dot product.

# %%
queries = np.array([[1, 0], [0, 2], [1, 1]], dtype=np.float32)
keys = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
values = np.array([[1, 0], [0, 1], [4, 4]], dtype=np.float32)
scores = queries @ keys.T / np.sqrt(np.float32(2))
print(scores.round(3))

# %% [markdown]
# A token must not see what comes after it. Its score for a later key becomes minus infinity, and
# the softmax makes a weight of exactly 0 of that.

# %%
is_later = np.triu(np.ones((3, 3), dtype=bool), k=1)
scores[is_later] = -np.inf
weights = np.exp(scores - scores.max(axis=1, keepdims=True))
weights /= weights.sum(axis=1, keepdims=True)
assert np.allclose(weights.sum(axis=1), 1)
assert (weights[is_later] == 0).all()
print(weights.round(3))

# %%
mixed = weights @ values
assert np.allclose(mixed[0], values[0]), "the first token sees itself alone"
print(mixed.round(3))

# %% [markdown]
# ## Why the square root?
#
# Before you run the next cell, guess: how large is the dot product of two random vectors of 64
# numbers around 1? And what does a softmax make of such scores?

# %%
random = np.random.default_rng(0)
widths = [4, 16, 64, 256]
spread, largest = [], []
for width in widths:
    q, k = random.normal(size=(2, 1000, width))
    products = (q * k).sum(axis=1)
    spread.append(products.std())
    rows = products.reshape(100, 10)
    exp = np.exp(rows - rows.max(axis=1, keepdims=True))
    largest.append((exp / exp.sum(axis=1, keepdims=True)).max(axis=1).mean())
for row in zip(widths, spread, largest, strict=True):
    print("width {:4}: spread {:5.1f}, largest of ten weights {:.2f}".format(*row))
assert 7 < spread[2] < 9

# %% [markdown]
# The spread is the square root of the width. Without the division, one weight of ten is almost 1 in
# a wide head, whatever the head has learned.
#
# ## The heads of a real model

# %%
model = InspectedModel.load(resolve_model("tiny-books"))
prompt = model.encode("The old man said to the young man that the old man was tired")
tokens = [model.tokenizer.decode([token]) for token in prompt]
statistics = head_statistics(model, prompt)
best = max(statistics, key=lambda one: one.previous_token or 0.0)
print(f"layer {best.layer}, head {best.head} gives {best.previous_token:.0%} of its attention")
print("to the token before.")
assert (best.previous_token or 0.0) > 0.3

# %%
square = np.zeros((len(prompt), len(prompt)), dtype=np.float32)
square[np.tril_indices(len(prompt))] = attention_weights(model, prompt, best.layer)[0, best.head]
figure, axes = plt.subplots(figsize=(6, 5))
axes.imshow(square, cmap="Blues")
axes.set_xticks(range(len(tokens)), tokens, rotation=90)
axes.set_yticks(range(len(tokens)), tokens)
axes.set_xlabel("key: the token that is read")
axes.set_ylabel("query: the token that reads")
axes.set_title(f"Layer {best.layer}, head {best.head}: attention to the token before")
figure.tight_layout()
assert np.allclose(square.sum(axis=1), 1, atol=1e-3)

# %% [markdown]
# ## Go on
#
# Write it yourself, for any number of heads: `nanovllm learn show 4`.
