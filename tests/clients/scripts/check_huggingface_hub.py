"""huggingface_hub's InferenceClient and its asynchronous twin."""

from checks import KEY, MESSAGES, MODEL, PERSON, PROMPT, URL, V1, refused, works
from huggingface_hub import AsyncInferenceClient, InferenceClient

client = InferenceClient(base_url=URL, api_key=KEY)


@works
def chats() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content


@works
def chat_streams() -> None:
    stream = client.chat_completion(MESSAGES, model=MODEL, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream)


@works
async def async_chats() -> None:
    async with AsyncInferenceClient(base_url=V1, api_key=KEY) as opened:
        answer = await opened.chat_completion(MESSAGES, model=MODEL, max_tokens=8)
        assert answer.choices[0].message.content


@works
def conversations() -> None:
    messages = list(MESSAGES)
    for question in ("And then?", "Why?"):
        answer = client.chat_completion(messages, model=MODEL, max_tokens=8)
        messages += [answer.choices[0].message, {"role": "user", "content": question}]


@works
def json_schemas() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    answer = client.chat_completion(MESSAGES, model=MODEL, max_tokens=200, response_format=form)
    assert answer.choices[0].finish_reason == "stop"


@refused('the client sends "dummy" where no model is named; name it', naming="404")
def chats_without_a_model() -> None:
    client.chat_completion(MESSAGES, max_tokens=8)


@refused("text_generation is the interface of TGI, not of OpenAI", naming="405")
def text_generation() -> None:
    client.text_generation(PROMPT, max_new_tokens=8)
