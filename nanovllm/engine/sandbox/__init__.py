"""Child processes for work on texts from strangers: grammars and chat templates.

Compiling a grammar or a template can overflow the stack, allocate gigabytes or run for minutes inside of a library, where no
exception ends it. Such work runs in a process with limits of memory, stack and processor time; reaching one ends that process alone.

    messages        length-prefixed frames of JSON and bytes over a socket           both sides
    spawn           start a process that has one end of a socket                     this side
    main            where such a process begins                                      in the child
    limits          what a child may use, and what its end means                     both sides
    fork_server     a process with llguidance and the tokenizer, forked per grammar  in the child
    grammar_worker  compiles one grammar, then computes token masks                  in the child
    json_schemas    forbids the properties that a JSON schema does not declare       in the child
    gbnf            translates llama.cpp's notation of grammars to Lark              in the child
    template_worker compiles one chat template, then renders messages                in the child
    provenance      text that knows which characters the template itself wrote       in the child

The modules of the child import neither NumPy nor the engine, so that it starts in a fraction of a second.
"""
