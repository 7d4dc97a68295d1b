"""`nanovllm bench`: measurements of an engine and of a server.

offline      latency and throughput of an engine in this process
serve        a load generator for a running server
http_client  the HTTP client of the load generator
roofline     how close a run comes to the limits of the machine
machine      measures those limits: memory bandwidth and multiply-add rate
report       the description of the machine, and the line of JSON at the end
"""
