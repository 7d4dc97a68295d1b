"""Chat prompts: messages rendered by a checkpoint's chat template.

messages  checks the messages of a Python program
template  a chat template: loading, rendering and tokenization
prompts   messages to token ids, for the Python API
examples  conversations to train on
"""
