"""Structured outputs: token masks from grammars, computed in a few worker processes.

grammar     the grammars of requests, as the engine sees them
pool        has grammars compiled and masks computed, and moves what workers lose
table       the grammars by their keys, and which of them makes way for another
worker_set  the workers: which one compiles a grammar, their start and their end
worker      one worker: what it holds, and what it is doing
states      a grammar, a sequence, and their states
limits      resource limits of grammars, and error messages

Who owns what:

    a request's sequence    SequenceGrammar: its tokens, the mask after them, or an error; for the
                            pool it is a MaskSequence
    a grammar               PooledGrammar, in the pool: one for equal texts, of all clients
    a compiled grammar      one worker, or none; the worker computes the masks of its sequences
    a process, its socket   one GrammarWorker, whose methods run where the pool is polled

The states of a grammar:

    state      it has                         until                                      then
    WAITING    a place in the compile queue   a worker is idle                           COMPILING
                                              no sequence needs it                       EVICTED
                                              it has waited for max_wait_s               FAILED
    COMPILING  a worker for itself            the worker has compiled it                 READY
                                              the worker has ended for another reason    WAITING
                                              it is invalid, or reached a limit          FAILED
    READY      a worker, beside others        the worker ends, is late, or has no room   EVICTED
    EVICTED    its first mask                 a sequence needs another mask              WAITING
    FAILED     an error for all sequences

A new grammar whose last sequence is released while it waits is forgotten, and a worker that is late
compiling it is ended. There is no thread: the engine polls the pool at each step, and whoever waits
for a mask does.
"""
