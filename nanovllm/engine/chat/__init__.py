"""Chats: from messages to a prompt by the chat template of a checkpoint.

messages          checks the messages that a Python program gives
prompts           from messages to token ids, for the Python API
template          compiles and renders a template
template_process  the worker process in which a template runs
"""
