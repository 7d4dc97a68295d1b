"""Stream a conversation of two turns, with a chat template passed as an argument.

The bundled model was trained on books and has no chat template. A checkpoint that has one
(tokenizer_config.json or chat_template.jinja) needs no `chat_template` argument.

Run: python examples/chat.py
"""

from nanovllm import LLM, SamplingParams

TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant:"""
QUESTIONS = ["Tell me about the sea.", "And what did the old man say?"]


def main() -> None:
    params = SamplingParams(temperature=0.7, max_tokens=40, seed=7, stop="\nuser:")
    messages = [{"role": "system", "content": "You tell stories."}]
    with LLM("tiny-books") as llm:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            print(f"user: {question}\nassistant:", end="")
            answer = ""
            for output in llm.stream_chat(messages, params, chat_template=TEMPLATE):
                print(output.outputs[0].text, end="", flush=True)
                answer += output.outputs[0].text
            print()
            messages.append({"role": "assistant", "content": answer.strip()})


if __name__ == "__main__":
    main()
