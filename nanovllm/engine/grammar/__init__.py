"""Structured outputs: token masks from grammars, computed in worker processes.

grammar        the grammars of requests, as the engine sees them
masks          requests masks from the workers, and receives them
pool           compiles grammars, each in a worker process
pool_thread    the thread that starts, monitors and ends the workers
command_queue  commands for that thread
table          the grammars of a pool, and their states
limits         resource limits of grammars, and error messages
"""
