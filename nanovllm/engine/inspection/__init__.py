"""Inspection: the state of a running engine, its last steps, and the reasons for waiting.

In reading order:

recorder   StepRecorder: records of the last steps, only while somebody watches
state      InspectedEngine: a frozen copy of requests, blocks and statistics
reasons    why a request waits, and why it was preempted
inspector  Inspector: watches, pauses and steps an engine from the event loop
"""
