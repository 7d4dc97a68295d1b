"""Training: from text files to a checkpoint that the server loads."""
