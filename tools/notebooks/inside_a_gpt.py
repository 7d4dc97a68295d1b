"""
# Inside a GPT

Four ways to look into a trained model: what each layer would predict, which tokens lie near each
other, what every head reads, and what the model loses when a part is switched off. The bundled
model has a few million parameters, so everything takes seconds.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from nanovllm import ablate
from nanovllm.hub import resolve_model
from nanovllm.inspection.attention import head_statistics
from nanovllm.inspection.embeddings import neighbors, project
from nanovllm.inspection.logit_lens import logit_lens
from nanovllm.inspection.observe import InspectedModel

model = InspectedModel.load(resolve_model("tiny-books"))
prompt = model.encode("The old man said to the young man that he was very")
text = [model.tokenizer.decode([token]) for token in prompt]
print(model.config.layers, "layers of", model.config.heads, "heads;", len(prompt), "tokens")

# %% [markdown]
# ## The logit lens: the prediction after each layer
#
# Every block adds to the row of a token. Read after each block, through the last norm and the head,
# the row says what the model would predict if it ended there.

# %%
lens = logit_lens(model, prompt, top=3)
for name, cells in zip(lens["layers"], lens["cells"], strict=True):
    shown = ", ".join(f"{one['text']!r} {one['p']:.0%}" for one in cells[-1]["top"])
    print(f"{name:12} {shown}")

# %% [markdown]
# ## Embeddings: which tokens lie near each other

# %%
for word in (" he", " said", " red", " London"):
    (token,) = model.tokenizer.encode(word)[:1]
    near = [model.tokenizer.decode([other]) for other, _ in neighbors(model, token, 6)]
    print(f"{word!r}: {near}")

# %%
points = project(model, limit=400)
figure, axes = plt.subplots(figsize=(8, 6))
axes.scatter(points.points[:, 0], points.points[:, 1], s=6, color="lightgray")
for token, (x, y) in zip(points.token_ids[::8], points.points[::8], strict=True):
    axes.annotate(model.tokenizer.decode([token]).strip(), (x, y), fontsize=8)
axes.set_title("The embeddings of 400 frequent tokens, first two principal components")
axes.set_xlabel("component 1")
axes.set_ylabel("component 2")
assert points.points.shape == (400, 2)

# %% [markdown]
# ## What the heads read
#
# A guess before you look: does every layer have a head for the token before?

# %%
heads = np.zeros((model.config.layers, model.config.heads))
for one in head_statistics(model, prompt):
    heads[one.layer, one.head] = one.previous_token or 0.0
figure, axes = plt.subplots(figsize=(6, 4))
picture = axes.imshow(heads, cmap="Blues", vmin=0, vmax=1)
axes.set_xlabel("head")
axes.set_ylabel("layer")
axes.set_title("Attention to the token before")
figure.colorbar(picture, label="mean weight")
assert heads.max() > 0.3

# %% [markdown]
# ## Switch a part off
#
# The loss on a text, without each head and each block in turn. Which layer can the model spare?

# %%
STORY = (
    "Once upon a time there was a little girl who lived with her mother in a small house at the "
    "edge of the wood. One day her mother said to her, take this basket to your grandmother, and "
    "do not leave the path. The girl promised, and went out into the morning."
)
result = ablate("tiny-books", [STORY], use_tqdm=False)
print(f"whole model: {result.loss:.3f} nats per token")
for part in sorted(result.parts, key=lambda part: -part.change)[:8]:
    print(f"without {part.part}: {part.loss:.3f} ({part.change:+.3f})")
assert max(part.change for part in result.parts) > 0.5

# %% [markdown]
# ## Go on
#
# The same in the browser, for any prompt: `nanovllm serve`, then open the page. To write the parts
# yourself: `nanovllm learn show 5`.
