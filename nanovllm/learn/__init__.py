"""The course: twelve steps from bytes to a server, each judged by this project's own assertions.

    course    the steps: title, time, and the code of the project that does the same
    parts     the reader's code by step; the project's where a part is not written yet
    stubs     a solution without its bodies
    folder    the reader's folder and progress
    checking  cases, mistakes, and what differs between two results
    judge     runs a check in a process with limits, and reports what it found
    worker    that process
    tiny_model  a network drawn from a seed, and what transformers computes with it
    texts     two English texts to learn from and to judge with
    engine    an engine that runs the reader's code
    backend   the network and the sampler of that engine
    scheduler  the reader's scheduler and block manager in it
    plan_check  what every plan of that scheduler must keep
    streaming  the reader's streamed text and stop strings in it
    guard     calls of the reader's code in it
    readers_lines  the lines of the reader's files in a traceback
    race      the reader's engine beside this project's, and where its time goes
    steps     one package a step: page, solution, check, hints

The reader's code is imported as it is: it has the rights of the reader. The limits of the process
are for accidents, such as an endless loop.
"""
