"""The types of the inspector's responses, for mypy and for /openapi.json."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from nanovllm.engine.inspection.inspector import Action
from nanovllm.engine.inspection.recorder import Kind
from nanovllm.engine.inspection.state import Phase
from nanovllm.server.metrics import LatencyHistogram

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, description="per second, over about the last second")]


class CodePart(TypedDict):
    """Whose code a part of the engine is: the reader's of the course, or this project's."""

    part: str
    is_readers: bool


class InspectorConfig(TypedDict):
    """The model and the engine's settings."""

    model: str
    max_num_seqs: Count
    max_num_batched_tokens: Count
    block_size: Count
    num_blocks: Count
    max_model_len: Count
    layers: Count
    heads: Count
    d_model: Count
    vocab: Count
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    num_threads: Count
    backend: str
    parts: Annotated[list[CodePart], Field(description="empty unless the backend is learn:DIR")]


class RequestState(TypedDict):
    """An unfinished request; a prompt with n choices is n requests."""

    id: str
    choice: Count
    state: Literal["running", "waiting"]
    phase: Annotated[
        Phase,
        Field(
            description="prefill and decode run, queued and preempted wait; blocked requests "
            "cannot run although there is room"
        ),
    ]
    priority: int
    age_s: Seconds
    prompt_tokens: Count
    computed_tokens: Annotated[
        int, Field(ge=0, description="tokens whose keys and values are in the KV cache")
    ]
    output_tokens: Count
    max_tokens: Count
    reused_tokens: Annotated[
        int, Field(ge=0, description="prompt tokens that were cached or shared by another choice")
    ]
    preemptions: Count
    num_blocks: Count
    reason: Annotated[
        str | None, Field(description="why it waits or was preempted; null while it advances")
    ]
    prompt: Annotated[
        str | None,
        Field(description="at most 200 characters; null without --inspector-shows-prompts"),
    ]


class BlockState(TypedDict):
    """The blocks of the KV cache."""

    total: Count
    used: Annotated[int, Field(ge=0, description="held by requests")]
    cached: Annotated[int, Field(ge=0, description="free, and found by prompts with the prefix")]
    free: Annotated[int, Field(ge=0, description="neither used nor cached")]
    shared: Annotated[int, Field(ge=0, description="used by at least two requests")]
    cells: Annotated[
        list[list[int]],
        Field(
            description="runs of equal cells as [value, length]: 0 free, 1 cached, -k shared by k "
            "requests, 2+i held by requests[i] (or by an omitted request)"
        ),
    ]
    blocks_per_cell: Annotated[
        int, Field(ge=1, description="more than 1 above 4,096 blocks; the most used block shows")
    ]


class StepSequence(TypedDict):
    """The tokens of one request in a step."""

    id: str
    choice: Count
    start: Annotated[int, Field(ge=0, description="position of the first token")]
    count: Count
    kind: Annotated[
        Kind,
        Field(
            description="prefill: all tokens that were left; chunk: a part of them; decode: the "
            "newest token; fork: a choice that begins at another choice's prompt"
        ),
    ]
    drafted: NotRequired[
        Annotated[int, Field(ge=1, description="the last of the tokens, which were drafted")]
    ]
    accepted: NotRequired[
        Annotated[int, Field(ge=0, description="drafted tokens that were drawn too")]
    ]


class Preempted(TypedDict):
    """A preempted request."""

    id: str
    reason: str


class Finished(TypedDict):
    """A request that has ended."""

    id: str
    reason: Literal["stop", "length", "abort", "error"]


class CacheHit(TypedDict):
    """Prompt tokens that were not computed."""

    id: str
    tokens: Count


class StepBlocks(TypedDict):
    """Blocks after a step."""

    used: Count
    cached: Count
    free: Count


class Step(TypedDict):
    """One step of the engine, and the events since the step before it."""

    step: Count
    time_s: Annotated[float, Field(ge=0, description="its start, since the engine's start")]
    duration_s: Seconds
    num_tokens: Annotated[int, Field(ge=0, description="computed, drafted ones included")]
    num_prompt_tokens: Count
    num_decode_tokens: Annotated[
        int, Field(ge=0, description="that decoding sequences got; one each without drafts")
    ]
    sequences: list[StepSequence]
    admitted: list[str]
    preempted: list[Preempted]
    finished: list[Finished]
    cache_hits: list[CacheHit]
    num_copies: Annotated[int, Field(ge=0, description="blocks that were copied on write")]
    num_running: Count
    num_waiting: Count
    blocks: StepBlocks


class Totals(TypedDict):
    """Counters since the start, as in /metrics."""

    steps: Count
    preemptions: Count
    prefix_cache_queries: Count
    prefix_cache_hits: Count
    prompt_tokens: Count
    generation_tokens: Count


class Rates(TypedDict):
    """Rates of about the last second."""

    tokens_per_s: Rate
    prompt_tokens_per_s: Rate
    steps_per_s: Rate


class EngineStateEvent(TypedDict):
    """The state of the engine between two steps; in the stream with the steps since then."""

    step: Annotated[int, Field(ge=0, description="number of the last step")]
    time_s: Annotated[float, Field(ge=0, description="since the engine's start")]
    is_paused: bool
    pause_left_s: Annotated[
        Seconds | None, Field(description="until the pause ends by itself; null without one")
    ]
    can_control: Annotated[bool, Field(description="whether POST /v1/engine/control is allowed")]
    shows_prompts: bool
    config: InspectorConfig
    requests: Annotated[
        list[RequestState], Field(description="running first, then waiting in their order")
    ]
    requests_omitted: Annotated[int, Field(ge=0, description="requests beyond the first 256")]
    blocks: BlockState
    last_step: Annotated[Step | None, Field(description="null if no step has been recorded yet")]
    totals: Totals
    rates: Rates
    ttft_s: LatencyHistogram
    itl_s: LatencyHistogram
    steps: NotRequired[
        Annotated[
            list[Step],
            Field(description="events only: the newest 16 steps since the last event"),
        ]
    ]
    steps_omitted: NotRequired[
        Annotated[int, Field(ge=0, description="events only: earlier steps since the last event")]
    ]


class VocabularyTokens(TypedDict):
    """The bytes of each token in the order of ids, in GPT-2's character for each byte."""

    tokens: list[str]


class StepList(TypedDict):
    """The last steps, oldest first."""

    steps: list[Step]


class ControlRequest(BaseModel):
    """An action of the debugger."""

    model_config = ConfigDict(extra="forbid")

    action: Annotated[
        Action, Field(description="pause, resume, or step: pause and run one step of the engine")
    ]


class ControlResult(TypedDict):
    """The engine after an action."""

    is_paused: bool
    step: Annotated[int, Field(ge=0, description="number of the last step")]
