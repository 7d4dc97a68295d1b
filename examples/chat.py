"""Stream a conversation with the bundled model, which answers like a person in an old novel.

Its chat template writes messages as quoted speech, since the model was trained on novels. For a
base model without a template, such as GPT-2, pass `chat_template="plain"`.

Run: python examples/chat.py
"""

from nanovllm import LLM

QUESTIONS = ["How are you this morning?", "And what did the old man say?"]


def main() -> None:
    messages = []
    with LLM("tiny-books") as llm:
        params = llm.default_sampling_params().clone(max_tokens=60, seed=3)
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            print(f"You: {question}\nModel: ", end="")
            answer = ""
            for output in llm.stream_chat(messages, params):
                print(output.outputs[0].text, end="", flush=True)
                answer += output.outputs[0].text
            print("\n")
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
