"""
# The engine, step by step

A server computes many texts at once. Here you hold its engine in your hand: you add requests, run
one step at a time, and look at who was computed, and where the keys and values went.
"""

# %%
import matplotlib.pyplot as plt
import numpy as np

from nanovllm import SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import StepPlan
from nanovllm.hub import resolve_model

# %% [markdown]
# ## A classroom engine
#
# With a normal cache nothing ever waits. This one has 16 blocks of 8 tokens, and computes at most
# 24 tokens a step.

# %%
config = EngineConfig(
    backend="numpy", num_blocks=16, block_size=8, max_num_batched_tokens=24, max_num_seqs=4
)
engine = Engine.load(resolve_model("tiny-books"), config)
engine.warm_up()


def add(name: str, prompt: str, tokens: int) -> None:
    """Queue a prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    request = GenerationRequest(prompts=[prompt], params=params, request_id=name)
    for prompt_request in engine.input_processor.process(request):
        for sequence in prompt_request.requests:
            engine.add_request(sequence)


add("A", "Once upon a time there was a little girl who lived in a house in the wood", 50)
add("B", "The old man said to the young man that he would never see the sea again", 50)
add("C", "Once upon a time there was a little girl who lived in a house in the town", 40)
print([request.request_id for request in engine.scheduler.requests])

# %% [markdown]
# ## One step
#
# A step is a plan: which sequences are computed, and how many tokens of each. Guess what the first
# plan is, with three prompts of about 17 tokens and a budget of 24.


# %%
class Watcher:
    """Writes down each step's plan, and what happens to the sequences."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.plans: list[dict[str, int]] = []
        self.events: list[str] = []

    def _note(self, text: str) -> None:
        self.events.append(f"step {len(self.plans) + 1}: {text}")

    def on_admitted(self, request: Request) -> None:
        """Note a sequence that starts to run."""
        found = request.num_computed_tokens
        self._note(f"{request.request_id} is admitted; {found} of its tokens are in the cache")

    def on_reused(self, request: Request, num_tokens: int) -> None:
        """Note tokens that another sequence has computed meanwhile."""
        self._note(f"{request.request_id} finds {num_tokens} more tokens in the cache")

    def on_preempted(self, request: Request, cause: object, other: Request | None) -> None:
        """Note a sequence that must give its blocks back."""
        self._note(f"{request.request_id} is preempted, and will be computed again")

    def on_finished(self, request: Request) -> None:
        """Note a sequence that has ended."""
        self._note(f"{request.request_id} has ended")

    def on_step(self, plan: StepPlan, stats: StepStats, started_s: float) -> None:
        """Note the number of computed tokens of each sequence."""
        self.plans.append({one.request.request_id: one.count for one in plan.sequences})


watcher = Watcher()
plans = watcher.plans
engine.scheduler.observer = watcher
engine.step()
print("step 1:", plans[0])
assert 0 < sum(plans[0].values()) <= 24

# %% [markdown]
# Prompts are cut into chunks, so that no step takes long and those that are decoding never wait
# for a long prompt.

# %%
tables: list[dict[str, list[int]]] = []
while engine.has_work:
    engine.step()
    tables.append({one.request_id: list(one.block_ids) for one in engine.scheduler.running})
    assert len(plans) < 500
print(len(plans), "steps;", engine.scheduler.num_preemptions, "preemptions")
assert all(sum(plan.values()) <= 24 for plan in plans)
for number, plan in enumerate(plans[:5], 1):
    print(f"step {number}: {plan}")
print(*watcher.events, sep="\n")

# %% [markdown]
# ## Who holds which block
#
# C begins like A. Do they share blocks? And what happens when no block is free?

# %%
names = ["1-A", "2-B", "3-C"]
picture = np.zeros((16, len(tables)))
for column, table in enumerate(tables):
    for index, name in enumerate(names):
        for block in table.get(name, []):
            picture[block, column] = 4 if picture[block, column] else index + 1
figure, axes = plt.subplots(figsize=(9, 4))
axes.imshow(picture, aspect="auto", cmap=plt.get_cmap("Pastel1", 5), vmin=-0.5, vmax=4.5)
axes.set_xlabel("step")
axes.set_ylabel("block")
axes.set_title("Blocks of the KV cache: A, B and C; the last colour is shared")
assert engine.scheduler.kv_cache.prefix_cache_hits > 0

# %% [markdown]
# ## Go on
#
# Write the block manager and the scheduler yourself: `nanovllm learn show 8`, then 9.
