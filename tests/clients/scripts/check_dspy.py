"""DSPy's language model class."""

import dspy
from checks import KEY, MODEL, PROMPT, V1, works

ACCESS = {"api_base": V1, "api_key": KEY, "cache": False, "num_retries": 0}


@works
def chats() -> None:
    assert dspy.LM(f"openai/{MODEL}", max_tokens=8, **ACCESS)(PROMPT)


@works
def several_answers() -> None:
    model = dspy.LM(f"openai/{MODEL}", max_tokens=8, temperature=1.0, **ACCESS)
    assert len(model(PROMPT, n=3)) == 3


@works
def completions() -> None:
    model = dspy.LM(f"text-completion-openai/{MODEL}", model_type="text", max_tokens=8, **ACCESS)
    assert model(PROMPT)
