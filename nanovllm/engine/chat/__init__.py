"""Chat prompts: messages rendered by a checkpoint's chat template.

messages          checks the messages of a Python program
template          a chat template: loading, rendering and tokenization
template_process  the worker processes in which a template runs
prompts           messages to token ids, for the Python API
"""
