"""
# Attention from scratch

Attention is the only place of a transformer where tokens exchange information. Here you build it
from a dot product, with numbers small enough to check on paper. Then you compute the attention of a
trained model with the same lines.

It takes a few seconds and needs no network: the model comes with nanovllm.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from nanovllm.hub import resolve_model
from nanovllm.inspection.attention import attention_weights, head_statistics
from nanovllm.inspection.observe import InspectedModel
from nanovllm.model.layers import layer_norm

# %% [markdown]
# ## A search with three vectors
#
# Each token has a *query* (what it looks for), a *key* (what it is found by) and a *value* (what it
# hands over). The *score* of a query for a key is their dot product, divided by the square root of
# their width.
#
# Here are three tokens, with vectors of two numbers. Row i of each array belongs to token i.

# %%
queries = np.array([[1, 0], [0, 2], [1, 1]], dtype=np.float32)
keys = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
values = np.array([[1, 0], [0, 1], [4, 4]], dtype=np.float32)

scores = queries @ keys.T / np.sqrt(np.float32(2))
print("scores: a row for each query, a column for each key")
print(scores.round(2))

# %% [markdown]
# The second query, [0, 2], matches the second and the third key, and not the first: its dot product
# with [1, 0] is 0.
#
# ## No look into the future
#
# The model learns to predict the next token, so no token may see a later one. The score of a later
# key becomes minus infinity. The softmax then turns the scores of each row into weights that add up
# to 1, and minus infinity into a weight of exactly 0.

# %%
is_later = np.triu(np.ones((3, 3), dtype=bool), k=1)
scores[is_later] = -np.inf
weights = np.exp(scores - scores.max(axis=1, keepdims=True))
weights /= weights.sum(axis=1, keepdims=True)
print("weights: each row adds up to 1")
print(weights.round(2))
assert np.allclose(weights.sum(axis=1), 1)
assert (weights[is_later] == 0).all()

# %% [markdown]
# ## The output: a mean of values
#
# Each token receives the mean of the values that it sees, weighted by its row.

# %%
outputs = weights @ values
print(outputs.round(2))
assert np.allclose(outputs[0], values[0])

# %% [markdown]
# The first token sees only itself and gets its own value back. The third gives half of its weight
# to itself, so most of its output comes from its own value [4, 4].
#
# ## All of it in one function

# %%


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights and the outputs of one head; each argument has a row for each token."""
    scores = queries @ keys.T / np.sqrt(np.float32(queries.shape[1]))
    scores[np.triu(np.ones(scores.shape, dtype=bool), k=1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights, weights @ values


assert np.allclose(attention(queries, keys, values)[1], outputs)

# %% [markdown]
# ## Why the square root?
#
# Guess before you run the next cell: how large are the dot products of random vectors of 64
# numbers, if the numbers have mean 0 and standard deviation 1? And what does a softmax make of ten
# such scores?

# %%
random = np.random.default_rng(0)


def largest_weight(scores: np.ndarray) -> float:
    """Return the largest weight of a row's softmax, in the mean over the rows."""
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return float((weights / weights.sum(axis=1, keepdims=True)).max(axis=1).mean())


print("width  spread of the scores  largest of ten weights  after the division")
for width in (4, 16, 64, 256):
    q, k = random.normal(size=(2, 1000, 10, width))
    dots = (q * k).sum(axis=2)
    undivided, divided = largest_weight(dots), largest_weight(dots / np.sqrt(width))
    print(f"{width:5}  {dots.std():20.1f}  {undivided:22.0%}  {divided:18.0%}")
    assert abs(dots.std() / np.sqrt(width) - 1) < 0.1
    assert divided < 0.4

# %% [markdown]
# The spread of the scores, their standard deviation, is the square root of the width. So the scores
# of a wide head put almost all weight on one of ten keys, before the head has learned anything.
# Divided by the square root, they behave the same at every width.
#
# ## The same function in a trained model
#
# The bundled model was trained on books. It makes a row of numbers of each token: the embedding of
# the token plus that of its position, then a layer norm. This row times a learned matrix gives the
# queries, keys and values of all heads, side by side. The next cell computes the first layer by
# hand and compares it with what nanovllm computes.

# %%
model = InspectedModel.load(resolve_model("tiny-books"))
config, first_layer = model.config, model.weights.layers[0]
prompt = model.encode("The old man said to the young man that the old man was tired")
tokens = [model.tokenizer.decode([token]) for token in prompt]

rows = model.weights.token_embedding[prompt] + model.weights.position_embedding[: len(prompt)]
rows = layer_norm(rows, first_layer.attention_norm, config.epsilon)
qkv = rows @ first_layer.qkv.weight + first_layer.qkv.bias
qkv = qkv.reshape(len(prompt), 3, config.heads, config.head_dim)
by_hand = np.stack([attention(*qkv[:, :, head].swapaxes(0, 1))[0] for head in range(config.heads)])

query, key = np.tril_indices(len(prompt))  # nanovllm leaves out the zeros of the later keys
maps = np.zeros((config.layers, config.heads, len(prompt), len(prompt)), dtype=np.float32)
maps[:, :, query, key] = attention_weights(model, prompt)
assert np.allclose(by_hand, maps[0], atol=1e-5)
print(f"{config.heads} heads of layer 0 agree with nanovllm to five digits")

# %% [markdown]
# ## All heads at once
#
# Each square is one head. A row is a query, a column a key, and darker means more weight. A dark
# first column is a head that reads the first token, often because it finds nothing else to read. A
# dark diagonal reads the token itself, and the line below it the token before.

# %%
figure, grid = plt.subplots(
    config.layers, config.heads, figsize=(1.7 * config.heads, 1.8 * config.layers)
)
for (layer, head), axes in np.ndenumerate(grid):
    axes.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1)
    axes.set_title(f"layer {layer}, head {head}", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
figure.suptitle("Attention weights: rows are queries, columns keys")
figure.tight_layout()

# %% [markdown]
# ## Which head reads what?
#
# The next cell looks for the head that gives most weight to the token before, to the first token
# and to itself. Chance is the share of a head that spreads its weight evenly over all it sees.

# %%
statistics = head_statistics(model, prompt)
chance = float(np.mean([1 / (query + 1) for query in range(2, len(prompt))]))
kinds = {"previous_token": "the token before", "first_token": "the first token", "self": "itself"}
for kind, name in kinds.items():
    shares = [getattr(head, kind) for head in statistics]
    best = statistics[int(np.argmax(shares))]
    print(f"layer {best.layer}, head {best.head} gives {max(shares):.0%} of its weight to {name}")
    assert max(shares) > chance
print(f"chance gives {chance:.0%} to each")

# %% [markdown]
# ## One head, token by token
#
# This is the head that gives most weight to the token before. Read a row from left to right: from
# which tokens does this token take its output?

# %%
best = max(statistics, key=lambda head: head.previous_token or 0.0)
figure, axes = plt.subplots(figsize=(6.5, 5.5))
picture = axes.imshow(maps[best.layer, best.head], cmap="Blues", vmin=0, vmax=1)
axes.set_xticks(range(len(tokens)), tokens, rotation=90)
axes.set_yticks(range(len(tokens)), tokens)
axes.set_xlabel("key: the token that is read")
axes.set_ylabel("query: the token that reads")
axes.set_title(f"Layer {best.layer}, head {best.head}")
figure.colorbar(picture, label="attention weight")
figure.tight_layout()

# %% [markdown]
# ## Go on
#
# - Change the prompt, and run the cells below it again.
# - Write attention yourself, for any number of heads: `nanovllm learn show 4`.
# - See all of this in the browser, for any prompt: `nanovllm serve`, then open the page.
