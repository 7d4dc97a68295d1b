"""HTTP below the endpoints: middleware, request bodies, errors and connections.

In reading order:

errors          the error format and exception handlers
clients         who sends a request
request_log     request ids, the record of a request, and the log
access_log      what the access log leaves out
docs_page       the pages / and /docs
auth            API keys and the `Host` check
cors            cross-origin requests of web pages
request_line    HEAD requests, and paths that end with a slash
body_limit      limits on the size, time and memory of bodies
deadlines       the deadline of a request
worker_pools    thread pools for parsing, tokenizing and writing
body            read and validate a body
bounded_model   the base class of bodies, with bounded sizes
validation_errors  errors of a body's fields as one message
json_io         read and write JSON without stopping the event loop
event_stream    server-sent events
protocol        uvicorn's protocol with timeouts and limits
"""
