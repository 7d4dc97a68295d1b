"""`nanovllm run-batch`: files of requests in OpenAI's batch format, answered without a server.

input   reads and checks a file of requests
runner  answers requests with an engine
output  writes a file of answers that can be resumed
"""
