"""Complete many prompts in one batch. Outputs are in the order of the prompts.

Run: python examples/batch.py
"""

from nanovllm import LLM, SamplingParams

PROMPTS = [
    "She smiled and said",
    "The old man looked at her and",
    '"My dear," said',
    "It was a dark and stormy night",
]


def main() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=40, seed=99)
    with LLM("tiny-books") as llm:
        for output in llm.generate(PROMPTS, params):
            answer = output.outputs[0]
            print(f"{output.prompt}{answer.text}  [{answer.finish_reason}]\n")


if __name__ == "__main__":
    main()
