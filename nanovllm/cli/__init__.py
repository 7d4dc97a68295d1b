"""The `nanovllm` command. Each subcommand is a file with `add_parser` and `run`; main.py lists them."""
