"""
# The engine, step by step

A server computes many texts at once. In this notebook you are the server: you add requests to the
engine, run it one step at a time, and see whose tokens each step computes, and where their keys and
values are kept.

It takes a few seconds and needs no network: the model comes with nanovllm.
"""

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import StepPlan
from nanovllm.hub import resolve_model

# %% [markdown]
# ## A small engine
#
# The keys and values of all tokens are in the KV cache, which is divided into blocks. With a cache
# of normal size nothing ever waits, so this one is very small: 16 blocks of 8 tokens. A step
# computes at most 24 tokens, which is its *budget*.

# %%
NUM_BLOCKS, BLOCK_SIZE, BUDGET = 16, 8, 24
config = EngineConfig(
    backend="numpy",
    num_blocks=NUM_BLOCKS,
    block_size=BLOCK_SIZE,
    max_num_batched_tokens=BUDGET,
    max_num_seqs=4,
)
engine = Engine.load(resolve_model("tiny-books"), config)

# %% [markdown]
# ## Three requests
#
# A and B generate 50 tokens each, C 40. The prompts of A and C begin alike. Do all three fit in the
# cache to their end?

# %%
PROMPTS = {
    "A": "Once upon a time there was a little girl who lived in a house in the wood",
    "B": "The old man said to the young man that he would never see the sea again",
    "C": "Once upon a time there was a little girl who lived in a house in the town",
}
NEW_TOKENS = {"A": 50, "B": 50, "C": 40}
requests: dict[str, Request] = {}


def params_of(name: str) -> SamplingParams:
    """Return the settings of a request: the most probable token each time."""
    return SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS[name], ignore_eos=True)


for name, prompt in PROMPTS.items():
    generation = GenerationRequest(prompts=[prompt], params=params_of(name))
    [prompt_request] = engine.input_processor.process(generation)
    [requests[name]] = prompt_request.requests
    engine.add_request(requests[name])

needed = 0
for name, request in requests.items():
    blocks = math.ceil((request.num_prompt_tokens + NEW_TOKENS[name]) / BLOCK_SIZE)
    needed += blocks
    print(f"{name}: {request.num_prompt_tokens} + {NEW_TOKENS[name]} tokens, {blocks} blocks")
print(f"together {needed} blocks; the cache has {NUM_BLOCKS}")
assert needed > NUM_BLOCKS

# %% [markdown]
# They do not fit. Later you will see what the engine does about it.
#
# ## One step
#
# Each step has a plan: which requests are computed, and how many tokens of each. The scheduler
# makes it and tells an observer. Here is one that writes everything down. Guess the first plan: the
# prompts have about 19 tokens each, and the budget is 24.

# %%
NAMES = {request.request_id: name for name, request in requests.items()}


class Watcher:
    """Writes down the plan of each step, and what happens to the requests."""

    def __init__(self) -> None:
        self.plans: list[dict[str, int]] = []
        self.events: list[tuple[int, str, str]] = []

    def _note(self, request: Request, what: str) -> None:
        self.events.append((len(self.plans) + 1, NAMES[request.request_id], what))

    def on_admitted(self, request: Request) -> None:
        found = request.num_computed_tokens
        self._note(request, f"starts to run; {found} of its tokens are in the cache")

    def on_reused(self, request: Request, num_tokens: int) -> None:
        self._note(request, f"finds {num_tokens} more of its tokens in the cache")

    def on_preempted(self, request: Request, cause: object, other: Request | None) -> None:
        self._note(request, "is preempted: it gives its blocks back and waits")

    def on_finished(self, request: Request) -> None:
        self._note(request, "has all its tokens")

    def on_step(self, plan: StepPlan, stats: StepStats, started_s: float) -> None:
        counts = {NAMES[one.request.request_id]: one.count for one in plan.sequences}
        self.plans.append(counts)


watcher = Watcher()
engine.scheduler.observer = watcher
tables: list[dict[str, list[int]]] = []


def step() -> None:
    """Run one step; write down the blocks of each running request."""
    engine.step()
    tables.append({NAMES[one.request_id]: list(one.block_ids) for one in engine.scheduler.running})


step()
print("tokens computed in step 1:", watcher.plans[0])
print("blocks:", tables[0])
assert 0 < sum(watcher.plans[0].values()) <= BUDGET

# %% [markdown]
# A and B share the budget, and C waits. Neither prompt is complete: prompts are cut into *chunks*,
# so that a long one never holds up requests that already write.
#
# ## All other steps

# %%
while engine.has_work:
    step()
    assert len(tables) < 500
for number, plan in enumerate(watcher.plans[:4], 1):
    print(f"step {number} computes {plan}")
print()
for number, name, what in watcher.events:
    print(f"step {number:2}: {name} {what}")
assert all(sum(plan.values()) <= BUDGET for plan in watcher.plans)
assert engine.scheduler.num_preemptions > 0

# %% [markdown]
# - From step 3 on, each step computes one token of each request: they *decode* together.
# - C starts with tokens in the cache, because its prompt begins like that of A. It shares their
#   blocks. This is *prefix sharing*.
# - When no block is free, the request that came last is *preempted*. It keeps the tokens that it
#   has written. When it runs again, their keys and values are computed again, except those that
#   are still in the cache.
#
# ## The tokens of each step

# %%
COLORS = {"A": "#4c8bd6", "B": "#f0a030", "C": "#58b070"}
steps = np.arange(1, len(tables) + 1)
figure, axes = plt.subplots(figsize=(9, 3))
bottom = np.zeros(len(steps), dtype=np.int64)
for name, color in COLORS.items():
    counts = np.array([plan.get(name, 0) for plan in watcher.plans], dtype=np.int64)
    axes.bar(steps, counts, bottom=bottom, color=color, label=name)
    bottom += counts
axes.axhline(BUDGET, color="gray", linestyle=":", label="budget")
axes.set_xlabel("step")
axes.set_ylabel("tokens computed")
axes.set_ylim(0, 1.3 * BUDGET)
axes.set_title("Prompts fill the first steps, then each request adds one token a step")
axes.legend(loc="upper center", ncols=4)
figure.tight_layout()

# %% [markdown]
# The first bars are the prompts. The tall bars near the end are the preempted requests, whose
# tokens are computed again.
#
# ## The owner of each block
#
# Read a row from left to right: whose keys and values did this block hold? Blocks of two requests
# hold the common beginning of A and C.

# %%
NOBODY, SHARED = "#f3f3f3", "#8a4fa3"
owners = np.zeros((NUM_BLOCKS, len(tables)), dtype=np.int64)
for column, table in enumerate(tables):
    for index, name in enumerate(COLORS, 1):
        for block in table.get(name, []):
            owners[block, column] = 4 if owners[block, column] else index
figure, axes = plt.subplots(figsize=(9, 4.2))
palette = {"free": NOBODY, **COLORS, "A and C": SHARED}
axes.imshow(
    owners,
    aspect="auto",
    cmap=ListedColormap(list(palette.values())),
    vmin=-0.5,
    vmax=4.5,
    extent=(0.5, len(tables) + 0.5, NUM_BLOCKS - 0.5, -0.5),
)
for number, name, what in watcher.events:
    if "preempted" in what:
        axes.axvline(number - 0.5, color="black", linestyle=":")
        axes.text(number - 0.5, -0.7, f"{name} is preempted", ha="center", fontsize=9)
axes.set_xlabel("step")
axes.set_ylabel("block")
axes.set_title("Blocks of the KV cache", pad=20)
patches = [Patch(color=color, label=label) for label, color in palette.items()]
axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0))
figure.tight_layout()
assert (owners == 4).any()

# %% [markdown]
# Requests take blocks one by one, as they grow. When the last free block is gone, a preempted
# request leaves its blocks to the others.
#
# ## Do neighbors change the answers?
#
# B was cut into chunks, computed beside others, preempted and computed again. Here is each request
# once more, alone in a cache that is large enough.

# %%
alone = LLM("tiny-books", backend="numpy")
for name, request in requests.items():
    output = alone.generate(PROMPTS[name], params_of(name), use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == request.tokens[request.num_prompt_tokens :]
    print(f"{name}: the same {len(output.token_ids)} tokens: {output.text[:50]!r} ...")

# %% [markdown]
# Batching, chunks, sharing and preemption change when a token is computed, never which token.
#
# ## Go on
#
# - Give the cache 32 blocks, and run all cells again: who waits now?
# - Write the block manager and the scheduler yourself: `nanovllm learn show 8`, then 9.
