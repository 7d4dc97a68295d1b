"""From files to batches of tokens.

The modules in reading order:

text       text files, and their split into training and validation
tokenizer  character-level and byte-level BPE tokenizers
examples   prompts with completions, and conversations, in JSON Lines
dataset    batches without padding
prepare    from files to the two splits of a run
"""
