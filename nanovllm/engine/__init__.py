"""The engine: continuous batching of many requests on one model.

In reading order:

engine               step(): scheduler, batching, runner
scheduling/          which requests run in a step, and in which blocks of the KV cache
generation_request   what an endpoint or AsyncLLM asks for, in no endpoint's form
input_processor      checks prompts and settings, and prepares requests
request_limits       limits that a request must fit
generation_defaults  sampling defaults of the model
output_processor     from updates to text, token ids and log-probabilities
tokenizer            text to token ids and back
detokenizer          incremental text of an output, and stop strings
logprobs             packed log-probabilities
pooling              embeddings from hidden states
metrics              statistics of engine, steps and requests
call_runner          blocking calls from many threads, for LLM
engine_thread        the thread that steps an engine for AsyncEngine
async_engine         an engine for asyncio tasks
request_handle       a request that an asyncio task waits for
admission            limits on unfinished requests
beam_search          beam search over an engine's requests
chat/                chat templates
grammar/             structured outputs
sandbox/             processes for templates and grammars of unknown origin
"""
