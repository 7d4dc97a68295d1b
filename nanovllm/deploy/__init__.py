"""Replicas of the server on several machines, by Ray Serve (the extra `ray`).

settings        the models of an application, from the `args` of a Ray Serve config file
check           checks a config file before it is deployed, as a command and at the start
prefix_policy   which replica a request goes to; no Ray, so that the simulator uses it too
ray_router      the policy as a request router of Ray Serve
asgi            running an ASGI application without a socket
replica         one replica: the unchanged server, called by the ingress
prefix          the block hashes of a prompt in a request
relay           calling a replica for one HTTP request, and what a client sees when that fails
merged_metrics  /metrics of all replicas as one page
health          /health, from the replicas that run now or did when last known
ingress         the HTTP side: finds the model and the prefix of a request, answers /metrics
proxy           closes the paths of Ray Serve's proxy that list its applications
scaling         the autoscaling policy: ongoing requests, and the replicas' own admission
ray_serve       build(args): the application for `serve run`
"""
