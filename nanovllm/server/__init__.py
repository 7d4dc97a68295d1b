"""The OpenAI-compatible HTTP API, in reading order.

app        create_app: middleware, routes and settings
inspector  the state of the running engine
openai     the endpoints that run the model, and tokenization
openapi    the OpenAPI document
metrics    GET /metrics, and counts of HTTP requests
http       what is below any endpoint: bodies, errors, limits, streams, the request log
"""
