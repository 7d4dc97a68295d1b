"""The inspector: the state of the running engine over HTTP, in reading order.

state_routes    GET /v1/engine/state, /v1/engine/events, /v1/engine/steps; POST /v1/engine/control
event_stream    the stream of states, shared by all of its readers
documents       the JSON of a state and of a step
response_types  the types of responses, for the OpenAPI document
same_origin     refuses requests of other web pages
"""
