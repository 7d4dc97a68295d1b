"""`nanovllm bench`: benchmarks of an engine and of a server.

In reading order:

command      the parsers of its kinds
options      their options
offline      latency and throughput of an engine in this process
threads      speed by the number of threads
profile      where the time of a step goes
step_times   its times by operation and thread
timeline     its picture
serve        load generator for a running server
lengths      lengths of prompts and outputs that fit the context
drafts       what speculative decoding has drafted, and how much was accepted
http_client  HTTP client of the load generator
roofline     fractions of the machine's limits that a run reached
machine      measure these limits: memory bandwidth and peak FLOPS
report       description of the machine, and the line of JSON at the end
"""
