"""The engine: continuous batching of requests on one model.

In reading order:

engine               Engine.step(): scheduler, batching, runner
engine_parts         what an engine is made of, which the course replaces
speculation/         drafts tokens that a step verifies
scheduling/          selects the requests of each step and allocates their KV cache blocks
loading              loads a network in the types of the settings, and a draft model
memory               plans the KV cache within the memory of the process
generation_request   prompts and settings of a request, the same for all endpoints and APIs
input_processor      checks a request, and makes the sequences that the engine runs
prompt_reader        prompts in any form to token ids
request_limits       limits that a request must fit
generation_defaults  sampling defaults of the model
prompt_request       one prompt: its sequences, and its output
step_output          what a step has changed
update_router        passes a step's updates to the prompts they are for
sequence_output      converts the updates of a sequence to text and log-probabilities
ngram                what followed the last tokens where they occurred before
tokenizer            encodes text to token ids and decodes them
detokenizer          incremental detokenization and stop strings
logprobs             packed log-probabilities
pooling              embeddings from hidden states
metrics              statistics of engine, steps and requests
call_runner          runs blocking calls from many threads, for LLM
engine_thread        the thread that steps an engine for AsyncEngine
inspection/          state, step records and pauses of a running engine
async_engine         an engine for asyncio tasks
request_handle       a request that an asyncio task waits for
admission            limits on unfinished requests
beam_search          beam search over an engine's requests
chat/                chat templates
grammar/             structured outputs
sandbox/             worker processes for untrusted templates and grammars
"""
