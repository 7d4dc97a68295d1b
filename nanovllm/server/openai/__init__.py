"""The endpoints of the OpenAI API, with the extensions of vLLM, in reading order.

An endpoint parses its body into a GenerationRequest and renders outputs in its form.

endpoint          what all endpoints share between parser and renderer
renderer          outputs as a response, whole or as server-sent events
prompts           the field with the prompts, of completions and embeddings
schemas           the fields of bodies: those of completions, and shared ones
completions       POST /v1/completions
structured        response_format and structured_outputs
logprobs          log-probabilities in responses
beams             use_beam_search of completions and chats
chat_schemas      the fields of chats, and messages
chat_prompt       the prompt that the chat template makes of messages
chat              POST /v1/chat/completions
response_schemas  the fields of /v1/responses, and the items of its input
response_store    stored responses, GET and DELETE /v1/responses/{id}
responses         POST /v1/responses
embeddings        POST /v1/embeddings
endpoints         the list of these
tokenization      POST /tokenize and /detokenize, GET /tokenizer_info
response_types    the types of all responses
"""
