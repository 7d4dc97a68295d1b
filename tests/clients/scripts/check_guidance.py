"""guidance with its model for OpenAI."""

from checks import KEY, MODEL, V1, works
from guidance import assistant, gen, models, system, user
from guidance import json as gen_json
from person import Person


def ask(grammar: object) -> models.Model:
    state = models.OpenAI(MODEL, base_url=V1, api_key=KEY, echo=False)
    with system():
        state += "Tell a tale."
    with user():
        state += "Who went into the garden?"
    with assistant():
        state += grammar
    return state


@works
def text() -> None:
    assert ask(gen(name="tale", max_tokens=8))["tale"]


@works
def conversations() -> None:
    state = ask(gen(name="tale", max_tokens=8))
    with user():
        state += "And then?"
    with assistant():
        state += gen(name="more", max_tokens=8)
    assert state["more"]


@works
def json_schemas() -> None:
    answer = ask(gen_json(name="person", schema=Person, max_tokens=200))["person"]
    Person.model_validate_json(answer)
