"""A training loop of one's own: teach the bundled model a sentence with its blocks alone.

Gradients are NumPy arrays that the loop may read and change. Here those of the embeddings are set
to 0, so only the blocks and the final layer normalization learn.

Run: python examples/training_loop.py
"""

from tempfile import TemporaryDirectory

from nanovllm import LLM, SamplingParams, Schedule, TrainableModel

SENTENCE = "The old man bought a red bicycle and rode it to the sea."
STEPS = 15


def complete(model: str) -> str:
    """Return a model's continuation of the beginning of the sentence."""
    sampling = SamplingParams(temperature=0, max_tokens=20)
    with LLM(model) as llm:
        return llm.generate(["The old man bought"], sampling, use_tqdm=False)[0].outputs[0].text


def main() -> None:
    print("before:", repr(complete("tiny-books")))
    with LLM("tiny-books") as llm:
        tokens = llm.get_tokenizer().encode(SENTENCE)
    with TrainableModel.load("tiny-books") as model, TemporaryDirectory() as folder:
        optimizer = model.optimizer(weight_decay=0.0)  # decay would also change what is frozen
        schedule = Schedule(peak=2e-3, floor=2e-4, warmup_steps=2, steps=STEPS)
        for step in range(STEPS):
            loss = model.backward([tokens])
            for name in ("wte.weight", "wpe.weight"):
                model.gradients[name].fill(0.0)
            norm = optimizer.update(schedule.learning_rate(step))
            if step % 5 == 0 or step == STEPS - 1:
                print(f"step {step:2}  loss {loss:.3f}  gradient norm {norm:.2f}")
        model.save(folder)
        print("after: ", repr(complete(folder)))


if __name__ == "__main__":
    main()
