"""Use a running server with LangChain: a chain, a stream, and embeddings.

Start a server first: nanovllm serve
Run: python examples/langchain_client.py      (needs `pip install langchain-openai`)

Set OPENAI_BASE_URL for another server than http://127.0.0.1:8000/v1, OPENAI_API_KEY for its key.
"""

import os

from langchain_core.prompts import PromptTemplate
from langchain_openai import OpenAI, OpenAIEmbeddings
from pydantic import SecretStr

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
API_KEY = SecretStr(os.environ.get("OPENAI_API_KEY", "none"))
MODEL = os.environ.get("NANOVLLM_MODEL", "tiny-books")


def main() -> None:
    llm = OpenAI(base_url=BASE_URL, api_key=API_KEY, model=MODEL, max_tokens=32, temperature=0.7)
    chain = PromptTemplate.from_template("The {animal} said to the {person}:") | llm
    print(chain.invoke({"animal": "fox", "person": "king"}))

    for piece in llm.stream("She smiled and said"):
        print(piece, end="", flush=True)
    print()

    # The client does not know the server's tokenizer, so it must send text.
    embeddings = OpenAIEmbeddings(
        base_url=BASE_URL, api_key=API_KEY, model=MODEL, check_embedding_ctx_length=False
    )
    print(len(embeddings.embed_query("The sea was calm.")), "numbers")


if __name__ == "__main__":
    main()
