"""
# Inside a GPT

Four ways to look into a trained model: what it would predict after each layer, which tokens lie
near each other, what each head reads, and what the model loses when a part is switched off.

It takes a few seconds and needs no network: the model comes with nanovllm.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from nanovllm import ablate
from nanovllm.hub import resolve_model
from nanovllm.inspection.attention import head_statistics
from nanovllm.inspection.embeddings import neighbors, pca
from nanovllm.inspection.logit_lens import logit_lens
from nanovllm.inspection.observe import InspectedModel
from nanovllm.model.ablation import Part

model = InspectedModel.load(resolve_model("tiny-books"))
config = model.config
print(f"{config.num_parameters:,} parameters, {config.layers} layers of {config.heads} heads")
print(f"{config.vocab:,} tokens, each a row of {config.d_model} numbers")

# %% [markdown]
# ## The logit lens: a prediction after each layer
#
# Every token has a row of numbers. Each layer adds to it, and the last row gives the prediction of
# the next token. The *logit lens* reads earlier rows in the same way: what would the model predict
# if it ended here?
#
# Read a column from the bottom up. Darker means more probable.

# %%
prompt = model.encode("The old man said to the young man that he was very")
lens = logit_lens(model, prompt, top=3)
tops = [[cell["top"][0] for cell in row] for row in lens["cells"]]
figure, axes = plt.subplots(figsize=(11, 3.6))
axes.imshow(
    [[top["p"] for top in row] for row in tops], cmap="Blues", vmin=0, vmax=1.5, aspect="auto"
)
for row, column in np.ndindex(len(tops), len(prompt)):
    text = tops[row][column]["text"].replace("\n", "\\n")
    axes.text(column, row, text, ha="center", va="center", fontsize=8)
axes.set_xticks(range(len(prompt)), [token["text"] for token in lens["tokens"]])
axes.set_yticks(range(len(tops)), lens["layers"])
axes.invert_yaxis()
axes.set_xlabel("token of the prompt")
axes.set_title("The most probable next token, read after each layer")
figure.tight_layout()

# %% [markdown]
# The embeddings "predict" mostly the token itself: the output head is the table of embeddings, and
# each row fits itself best. Layer by layer, the rows turn from this token to the next one. The next
# cell measures that: the probability of the token that really follows, in the mean over the prompt.

# %%
of_next = [np.mean([cell["p_of_next"] for cell in row[:-1]]) for row in lens["cells"]]
for name, probability in zip(lens["layers"], of_next, strict=True):
    print(f"{name:24} {probability:6.1%}")
assert of_next[-1] > of_next[0]

# %% [markdown]
# ## Embeddings: tokens of similar use lie together
#
# For some tokens, the nearest others by the cosine of their embeddings:

# %%
for word in (" he", " said", " red", " three"):
    token = model.tokenizer.encode(word)[0]
    near = [model.tokenizer.decode([other]) for other, _ in neighbors(model, token, 6)]
    print(f"{model.tokenizer.decode([token]):6} ->{','.join(near)}")

# %% [markdown]
# Nobody told the model what a pronoun or a color is. Tokens that appear in the same places were
# pushed in the same direction. Here are words of five kinds, in the two directions in which their
# embeddings differ most (PCA):

# %%
KINDS = {
    "pronouns": "he she they we you it him them me",
    "saying": "said cried answered replied asked thought",
    "colors": "red white black green blue dark bright",
    "numbers": "two three four five six ten hundred",
    "time": "day night morning evening hour week year",
}
tokens = {  # of the words that are one token
    kind: [ids[0] for word in words.split() if len(ids := model.tokenizer.encode(f" {word}")) == 1]
    for kind, words in KINDS.items()
}
everything = model.weights.token_embedding[np.concatenate(list(tokens.values()))]
points, _ = pca(everything, 2)

figure, axes = plt.subplots(figsize=(8, 5))
start = 0
for kind, ids in tokens.items():
    here = points[start : start + len(ids)]
    axes.scatter(here[:, 0], here[:, 1], label=kind)
    for token, (x, y) in zip(ids, here, strict=True):
        axes.annotate(model.tokenizer.decode([token]), (x, y), fontsize=9)
    start += len(ids)
axes.set_xlabel("first principal component")
axes.set_ylabel("second principal component")
axes.set_title("Embeddings of words of five kinds")
axes.legend()
figure.tight_layout()

# %% [markdown]
# A plane cannot show all dimensions. The cosines of all pairs of these words say the same:

# %%
units = everything / np.linalg.norm(everything, axis=1, keepdims=True)
cosines = units @ units.T
kinds = np.repeat(np.arange(len(tokens)), [len(ids) for ids in tokens.values()])
is_same = kinds[:, None] == kinds
np.fill_diagonal(cosines, np.nan)  # a token with itself
within, between = np.nanmean(cosines[is_same]), np.nanmean(cosines[~is_same])
print(f"mean cosine within a kind {within:.2f}, between kinds {between:.2f}")
assert within > between

# %% [markdown]
# ## What the heads read
#
# Each head gives weights to the tokens that it sees. Three habits are common: to read the token
# before, the first token, or the token itself. Guess before you look: does every layer have a head
# for the token before? And how many heads mostly read the first token, which says the least?

# %%
statistics = head_statistics(model, prompt)
HABITS = {"previous_token": "the token before", "first_token": "the first token", "self": "itself"}
figure, grid = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
for axes, (habit, title) in zip(grid, HABITS.items(), strict=True):
    shares = np.reshape([getattr(head, habit) for head in statistics], (config.layers, -1))
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (layer, head), share in np.ndenumerate(shares):
        axes.text(head, layer, f"{share:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(config.heads))
    axes.set_yticks(range(config.layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
figure.suptitle("Share of its attention that each head gives, in the mean over the prompt, to")
colorbar = figure.colorbar(picture, ax=grid, label="mean attention weight")

# %% [markdown]
# ## Switch a part off
#
# Switch a part off and measure the loss on a text: the more it rises, the more the model needed the
# part. Guess first: which layer is needed most, and which can the model spare?

# %%
STORY = (
    "Once upon a time there was a little girl who lived with her mother in a small house at the "
    "edge of the wood. One day her mother said to her, take this basket to your grandmother, and "
    "do not leave the path. The girl promised, and went out into the morning."
)
NAMES = {"attention": "attention", "ffn": "feed-forward network", "block": "all of it"}
result = ablate("tiny-books", [STORY], use_tqdm=False)


def name_of(part: Part) -> str:
    """Return what a part is called in the chart."""
    return f"layer {part.layer}, {NAMES.get(part.kind, f'head {part.head}')}"


parts = sorted(result.parts, key=lambda each: each.change)
figure, axes = plt.subplots(figsize=(8, 4))
axes.barh([name_of(each.part) for each in parts[-12:]], [each.change for each in parts[-12:]])
axes.set_xlabel("rise of the loss, in nats per token")
axes.set_title("The twelve parts that the model needs most")
figure.tight_layout()

layers = [each for each in parts if each.part.kind == "block"]
print(f"whole model:     {result.loss:.2f} nats per token")
print(f"without layer {layers[0].part.layer}: {layers[0].loss:.2f}, the easiest to spare")
print(f"without layer {layers[-1].part.layer}: {layers[-1].loss:.2f}, the most needed")
print(f"a blind guess:   {np.log(config.vocab):.2f} = ln V for V tokens")
assert layers[-1].change > 0.5

# %% [markdown]
# The changes do not add up: two parts that do the same work are each easy to spare, but not both.
# And later layers build on the rows of the earlier ones, so without an early layer a model can be
# worse than a blind guess.
#
# ## Go on
#
# - Change the prompt, the words or the story, and run the cells again.
# - See all of this in the browser: `nanovllm serve`, then open the page.
# - Write the forward pass yourself: `nanovllm learn show 5`.
