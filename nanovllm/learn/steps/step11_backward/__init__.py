"""Step 11.

solution           what the reader writes
check              cases
mistakes           mistakes in the gradients that the check names
training_mistakes  those in clipping, learning rates, AdamW and the loop
"""
