"""Haystack's generators and embedders for OpenAI."""

from checks import DIMENSIONS, KEY, MODEL, PROMPT, V1, refused, works
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from person import Person

ACCESS = {"api_base_url": V1, "api_key": Secret.from_token(KEY)}
MESSAGES = [ChatMessage.from_user("Who went into the garden?")]


def chat(**settings: object) -> OpenAIChatGenerator:
    return OpenAIChatGenerator(
        model=MODEL, generation_kwargs={"max_tokens": 8, **settings}, **ACCESS
    )


@works
def chats() -> None:
    assert chat().run(MESSAGES)["replies"][0].text


@works
def chat_streams() -> None:
    pieces: list[str] = []
    chat().run(MESSAGES, streaming_callback=lambda piece: pieces.append(piece.content))
    assert "".join(pieces)


@works
def conversations() -> None:
    reply = chat().run(MESSAGES)["replies"][0]
    assert chat().run([*MESSAGES, reply, ChatMessage.from_user("Why?")])["replies"][0].text


@works
def json_schemas() -> None:
    reply = chat(max_tokens=200, response_format=Person).run(MESSAGES)["replies"][0]
    Person.model_validate_json(reply.text)


@works
def embeddings() -> None:
    assert len(OpenAITextEmbedder(model=MODEL, **ACCESS).run(PROMPT)["embedding"]) == DIMENSIONS
    embed = OpenAIDocumentEmbedder(model=MODEL, progress_bar=False, **ACCESS)
    assert len(embed.run([Document(content=PROMPT)])["documents"][0].embedding) == DIMENSIONS


@refused("the size of a vector cannot be chosen", naming="dimensions")
def dimensions() -> None:
    OpenAITextEmbedder(model=MODEL, dimensions=8, **ACCESS).run(PROMPT)
