"""LiteLLM by its three routes to such a server."""

import litellm
from checks import DIMENSIONS, KEY, MESSAGES, MODEL, PERSON, PROMPT, V1, raised_by, refused, works

CALL = {"api_base": V1, "api_key": KEY, "timeout": 60, "max_tokens": 8, "num_retries": 0}
ROUTES = ("openai", "hosted_vllm")


@works
def text_completions() -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt=PROMPT, logprobs=2, **CALL
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 8


@works
def text_completion_streams() -> None:
    stream = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt=PROMPT, stream=True, **CALL
    )
    assert "".join(chunk.choices[0].text or "" for chunk in stream)


@works
def chats() -> None:
    for route in ROUTES:
        answer = litellm.completion(model=f"{route}/{MODEL}", messages=MESSAGES, **CALL)
        assert answer.choices[0].message.content


@works
def chat_streams() -> None:
    for route in ROUTES:
        stream = litellm.completion(
            model=f"{route}/{MODEL}", messages=MESSAGES, stream=True, **CALL
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)


@works
def conversations() -> None:
    for route in ROUTES:
        for as_object in (True, False):
            messages = list(MESSAGES)
            for question in ("And then?", "Why?"):
                answer = litellm.completion(model=f"{route}/{MODEL}", messages=messages, **CALL)
                message = answer.choices[0].message
                messages += [
                    message if as_object else message.model_dump(),
                    {"role": "user", "content": question},
                ]


@works
def json_schemas() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    for route in ROUTES:
        answer = litellm.completion(
            model=f"{route}/{MODEL}", messages=MESSAGES, response_format=form,
            **{**CALL, "max_tokens": 200},
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content.startswith('{"name"')


@works
async def async_calls() -> None:
    answer = await litellm.acompletion(model=f"openai/{MODEL}", messages=MESSAGES, **CALL)
    assert answer.choices[0].message.content
    stream = await litellm.acompletion(
        model=f"openai/{MODEL}", messages=MESSAGES, stream=True, **CALL
    )
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


@works
def embeddings() -> None:
    answer = litellm.embedding(
        model=f"openai/{MODEL}",
        input=["one", "two"],
        api_base=V1,
        api_key=KEY,
        encoding_format="float",
    )
    assert len(answer.data[1]["embedding"]) == DIMENSIONS


@works
def errors_have_their_classes() -> None:
    error = raised_by(lambda: litellm.completion(model="openai/other", messages=MESSAGES, **CALL))
    assert isinstance(error, litellm.NotFoundError), repr(error)


@refused("tools are not supported", naming="tool")
def tools() -> None:
    function = {"type": "function", "function": {"name": "f", "parameters": PERSON}}
    litellm.completion(model=f"openai/{MODEL}", messages=MESSAGES, tools=[function], **CALL)
