"""Stream outputs, in plain Python and with asyncio.

Run: python examples/streaming.py
"""

import asyncio

from nanovllm import LLM, AsyncLLM, SamplingParams

PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=40, seed=10)


def stream_in_a_loop() -> None:
    """Print the new text of each output. Leaving the loop early aborts the request."""
    with LLM("tiny-books") as llm:
        for output in llm.stream("She smiled and said", PARAMS):
            print(output.outputs[0].text, end="", flush=True)
    print("\n")


async def stream_two_at_once() -> None:
    """Run two tasks on one model. `generate` yields cumulative outputs, as in vLLM."""
    async with AsyncLLM("tiny-books") as llm:

        async def answer(prompt: str) -> str:
            async for output in llm.generate(prompt, PARAMS):
                print(f"{prompt!r}: {len(output.outputs[0].token_ids)} tokens")
            return output.outputs[0].text

        texts = await asyncio.gather(answer("The old man"), answer("In the garden"))
    print("\n".join(texts))


if __name__ == "__main__":
    stream_in_a_loop()
    asyncio.run(stream_two_at_once())
