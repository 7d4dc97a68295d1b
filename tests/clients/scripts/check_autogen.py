"""AutoGen's client of OpenAI-compatible servers."""

from autogen_core.models import AssistantMessage, ModelInfo, SystemMessage, UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from checks import KEY, MODEL, PROMPT, V1, refused, works
from person import Person

info = ModelInfo(
    vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True
)
QUESTION = [SystemMessage(content="Tell a tale."), UserMessage(content=PROMPT, source="user")]


def client(max_tokens: int = 8) -> OpenAIChatCompletionClient:
    return OpenAIChatCompletionClient(
        model=MODEL, base_url=V1, api_key=KEY, model_info=info, max_tokens=max_tokens
    )


@works
async def chats() -> None:
    answer = await client().create(QUESTION)
    assert answer.content
    assert answer.usage.completion_tokens == 8


@works
async def chat_streams() -> None:
    pieces = [piece async for piece in client().create_stream(QUESTION)]
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == pieces[-1].content


@works
async def conversations() -> None:
    first = await client().create(QUESTION)
    turns = [AssistantMessage(content=first.content, source="teller")]
    again = UserMessage(content="And then?", source="user")
    assert (await client().create([*QUESTION, *turns, again])).content


@works
async def json_schemas() -> None:
    answer = await client(200).create(QUESTION, json_output=Person)
    assert Person.model_validate_json(answer.content)


@refused("tools are not supported", naming="tool")
async def tools() -> None:
    def weather(city: str) -> str:
        """Tell the weather."""
        return city

    await client().create(QUESTION, tools=[FunctionTool(weather, description="weather")])
