"""smolagents' model of OpenAI-compatible servers."""

from checks import KEY, MODEL, PERSON, PROMPT, V1, refused, works
from smolagents import OpenAIServerModel, Tool
from smolagents.models import ChatMessage, MessageRole


def model_of(max_tokens: int) -> OpenAIServerModel:
    return OpenAIServerModel(model_id=MODEL, api_base=V1, api_key=KEY, max_tokens=max_tokens)


model = model_of(8)
QUESTION = ChatMessage(role=MessageRole.USER, content=PROMPT)


class Weather(Tool):
    name = "weather"
    description = "Tell the weather."
    inputs = {"city": {"type": "string", "description": "a city"}}  # noqa: RUF012 - as documented
    output_type = "string"

    def forward(self, city: str) -> str:
        return city


@works
def chats() -> None:
    answer = model.generate([QUESTION])
    assert answer.content
    assert answer.token_usage.output_tokens == 8


@works
def streams() -> None:
    assert "".join(delta.content or "" for delta in model.generate_stream([QUESTION]))


@works
def conversations() -> None:
    first = model.generate([QUESTION])
    again = ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "And then?"}])
    assert model.generate([QUESTION, first, again]).content


@works
def json_schemas() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = model_of(200).generate([QUESTION], response_format=schema)
    assert answer.content.endswith("}")


@refused("tools are not supported", naming="tool")
def tools() -> None:
    model.generate([QUESTION], tools_to_call_from=[Weather()])
