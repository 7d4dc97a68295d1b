"""Use a running server with OpenAI's client: a completion, a stream, and embeddings.

Start a server first: nanovllm serve
Run: python examples/openai_client.py      (needs `pip install openai`)

Set OPENAI_BASE_URL for another server than http://127.0.0.1:8000/v1, OPENAI_API_KEY for its key.
"""

import os

from openai import OpenAI


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id

    completion = client.completions.create(
        model=model,
        prompt="She smiled and said",
        max_tokens=32,
        seed=7,
        extra_body={"top_k": 40},  # parameters of vLLM that OpenAI lacks
    )
    print(completion.choices[0].text)

    for chunk in client.completions.create(
        model=model, prompt="The old man", max_tokens=32, stream=True
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()

    embeddings = client.embeddings.create(model=model, input=["The sea.", "The ocean."])
    print(len(embeddings.data), "vectors of", len(embeddings.data[0].embedding), "numbers")


if __name__ == "__main__":
    main()
