"""The parsers of the commands. They import nothing that takes long: `--help` must be quick."""
