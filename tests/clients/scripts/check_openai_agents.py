"""The OpenAI Agents SDK with chat completions."""

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import KEY, MODEL, V1, refused, works
from openai import AsyncOpenAI
from person import Person

set_tracing_disabled(True)
QUESTION = "Who went into the garden?"


def agent(**settings: object) -> Agent:
    model = OpenAIChatCompletionsModel(MODEL, AsyncOpenAI(base_url=V1, api_key=KEY, max_retries=0))
    return Agent(
        "Teller", instructions="Tell a tale.", model=model,
        model_settings=ModelSettings(max_tokens=200 if settings else 8), **settings,
    )  # fmt: skip


@works
async def runs() -> None:
    assert (await Runner.run(agent(), QUESTION)).final_output


@works
async def conversations() -> None:
    first = await Runner.run(agent(), QUESTION)
    turns = [*first.to_input_list(), {"role": "user", "content": "And then?"}]
    assert (await Runner.run(agent(), turns)).final_output


@works
async def streams() -> None:
    stream = Runner.run_streamed(agent(), QUESTION)
    assert [event async for event in stream.stream_events()]
    assert stream.final_output


@works
async def output_types() -> None:
    answer = await Runner.run(agent(output_type=Person), QUESTION)
    assert isinstance(answer.final_output, Person)


@refused("tools are not supported", naming="tool")
async def tools() -> None:
    @function_tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return city

    await Runner.run(agent(tools=[weather]), QUESTION)
