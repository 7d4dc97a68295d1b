"""How throughput and latency grow with the number of replicas, measured and simulated.

trace        arrivals of requests, Poisson or in bursts, whose prompts share prefixes
cost_model   the time of an engine step from its tokens, fitted to measured steps
front        the proxy and the ingress, and their times
front_cost   the program that measures these times
simulator    replicas in simulated time: the project's scheduler, the router's policy
simulate     the program: fit, simulate 1 to 64 replicas, write the results
"""
