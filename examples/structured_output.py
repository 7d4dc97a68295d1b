"""Constrain outputs to a choice, a regular expression or a JSON schema.

Run: python examples/structured_output.py
"""

import json

from nanovllm import LLM, SamplingParams, StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main() -> None:
    specs = {
        "The story has": StructuredOutputs(choice=[" a happy end", " a sad end"]),
        "The year was": StructuredOutputs(regex=r" 1[0-9]{3}\."),
        "The captain of the ship:": StructuredOutputs(json=SCHEMA),
    }
    params = [
        SamplingParams(temperature=0, max_tokens=60, structured_outputs=spec)
        for spec in specs.values()
    ]
    with LLM("tiny-books") as llm:
        outputs = llm.generate(list(specs), params)
    for output in outputs:
        print(f"{output.prompt}{output.outputs[0].text}")
    print(json.loads(outputs[-1].outputs[0].text))


if __name__ == "__main__":
    main()
