"""The OpenAI-compatible HTTP API, in reading order.

app        create_app: middleware, routes and settings
inspector  the web page at `/` that shows the engine at work
openai     the endpoints that run the model, and tokenization
openapi    the OpenAPI document
status     GET /health, /version, /metrics and /load
service    what the routes of a server share: its settings, engine and control
metrics    the figures of /metrics, and counts of HTTP requests
http       what is below any endpoint: bodies, errors, limits, streams, the request log
"""
