"""`nanovllm run-batch`: files of requests in OpenAI's batch format, run without a server.

In reading order:

input   read and check a file of requests
runner  run the requests on an engine
output  write the responses to a file that a later run can resume
"""
