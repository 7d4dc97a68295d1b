"""Structured outputs: token masks from grammars, computed in worker processes.

grammar      the grammars of requests, as the engine sees them
masks        requests masks from the workers, and receives them
pool         compiles grammars, each in a worker process
pool_thread  the thread that starts, watches and ends the workers
table        the grammars of a pool and their states
limits       limits of grammars, and their errors
"""
