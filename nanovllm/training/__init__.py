"""Training: from text files to a checkpoint that the server loads.

text        files and folders of text, and the validation split
tokenizer   character-level and byte-level BPE tokenizers: trained, loaded, saved
dataset     tokens drawn as batches without padding
prepare     all of the data of a run: text or a token file to two datasets
"""
