"""Worker processes for what may overflow the stack, allocate gigabytes or run for minutes.

Grammars and chat templates are untrusted, and an inspection is large. No exception can end such
work inside a library, so it runs in a process with limits of memory, stack and processor time. A
process that reaches a limit ends; no other process is affected.

process_pool     calls a few processes of one kind, starts and replaces them   parent
process          one process: start, calls, messages, end                      parent
messages         length-prefixed messages of JSON and bytes over a socket      parent and child
limits           resource limits, and the meaning of exit codes                parent and child
main             entry point of a child                                        child
grammar_worker   compiles grammars, and computes token masks                   child
grammar_path     finds tokens that may come next in a grammar                  child
gbnf             translates GBNF, llama.cpp's grammar notation, to Lark        child
json_digits      limits the digits of the numbers of JSON                      child
json_schemas     forbids properties that a JSON schema does not declare        child
template_worker  compiles one chat template, then renders messages             child
provenance       strings that track which characters the template wrote        child

    parent                          child                        processes
    engine/grammar/pool.py          sandbox/grammar_worker.py    up to 3, each with many grammars
    engine/chat/template.py         sandbox/template_worker.py   up to 2 for each template
    inspection/worker_process.py    inspection/worker.py         1, while it is used

The modules of the child import neither NumPy nor the engine, so it starts in a fraction of a
second.
"""
