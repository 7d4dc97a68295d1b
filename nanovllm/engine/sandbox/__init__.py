"""Worker processes for untrusted grammars and chat templates.

Compiling a grammar or a template can overflow the stack, allocate gigabytes or run for minutes
inside a library, where no exception can end it. This work runs in a process with limits of memory,
stack and processor time. A process that reaches a limit ends; no other process is affected.

messages         length-prefixed messages of JSON and bytes over a socket   parent and child
limits           resource limits, and the meaning of exit codes             parent and child
spawn            starts a child with one end of a socket                    parent
launcher         starts and ends grammar workers                            parent
main             entry point of a child                                     child
fork_server      loads llguidance and the tokenizer, forks grammar workers  child
grammar_worker   compiles one grammar, then computes token masks            child
gbnf             translates GBNF, llama.cpp's grammar notation, to Lark     child
json_digits      limits the digits of the numbers of JSON                   child
json_schemas     forbids properties that a JSON schema does not declare     child
template_worker  compiles one chat template, then renders messages          child
provenance       strings that track which characters the template wrote     child

The modules of the child import neither NumPy nor the engine, so it starts in a fraction of a
second.
"""
