"""The inspector: the web page at `/` that shows the engine at work, and the endpoints behind it.

page            serves the page and its assets, which load nothing from other hosts
state_routes    GET /v1/engine/state, events, steps and vocabulary; POST /v1/engine/control
state_feed      the stream of states, shared by all of its readers
documents       the JSON of a state and of a step
response_types  the types of responses, for the OpenAPI document
same_origin     refuses requests of other web pages
inspect_routes  /v1/inspect/*: attention, logit lens and embeddings

The page, its scripts (ES modules without a build step) and its style sheets are in
`nanovllm/pages/assets/`.
"""
