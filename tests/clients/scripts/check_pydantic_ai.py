"""pydantic-ai with an OpenAI-compatible provider."""

from checks import KEY, MODEL, V1, refused, works
from person import Person
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=V1, api_key=KEY))
QUESTION = "Who went into the garden?"


@works
def runs() -> None:
    answer = Agent(model, model_settings={"max_tokens": 8}).run_sync(QUESTION)
    assert answer.output
    assert answer.usage.output_tokens == 8


@works
def conversations() -> None:
    agent = Agent(model, instructions="Tell a tale.", model_settings={"max_tokens": 8})
    first = agent.run_sync(QUESTION)
    assert agent.run_sync("And then?", message_history=first.all_messages()).output


@works
async def streams() -> None:
    agent = Agent(model, model_settings={"max_tokens": 8})
    async with agent.run_stream(QUESTION) as stream:
        assert "".join([piece async for piece in stream.stream_text(delta=True)])


@works
def native_output() -> None:
    agent = Agent(model, output_type=NativeOutput(Person), model_settings={"max_tokens": 200})
    assert isinstance(agent.run_sync(QUESTION).output, Person)


@refused("tools are not supported; NativeOutput works", naming="tool")
def the_default_output_by_tools() -> None:
    Agent(model, output_type=Person).run_sync(QUESTION)
