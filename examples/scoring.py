"""Score texts: token log-probabilities, perplexity, and the more probable of two endings.

`max_tokens=0` generates nothing. `prompt_logprobs=0` reports the prompt's own tokens only.

Run: python examples/scoring.py
"""

import math

from nanovllm import LLM, RequestOutput, SamplingParams

TEXTS = ["The old man went to the sea.", "The sea old the to went man."]
QUESTION, ENDINGS = "The king sat upon his", [" throne", " banana"]
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)


def token_logprobs(output: RequestOutput) -> list[float]:
    """Return the natural log-probability of each prompt token but the first, which has none."""
    assert output.prompt_logprobs is not None
    positions = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
    return [position[token].logprob for position, token in positions if position is not None]


def main() -> None:
    with LLM("tiny-books") as llm:
        for output in llm.generate(TEXTS, SCORE):
            logprobs = token_logprobs(output)
            perplexity = math.exp(-sum(logprobs) / len(logprobs))
            print(f"{output.prompt}  perplexity {perplexity:.1f}")

        # Concatenate token ids, not texts, so that no token spans question and ending.
        tokenizer = llm.get_tokenizer()
        question = tokenizer.encode(QUESTION)
        endings = [tokenizer.encode(ending) for ending in ENDINGS]
        outputs = llm.generate([question + ending for ending in endings], SCORE)
    for text, ending, output in zip(ENDINGS, endings, outputs, strict=True):
        score = sum(token_logprobs(output)[-len(ending) :])
        print(f"{QUESTION}{text}  log-probability of the ending {score:.2f}")


if __name__ == "__main__":
    main()
