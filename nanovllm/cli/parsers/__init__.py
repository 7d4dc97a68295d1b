"""The parsers of the commands, apart from the commands so that `--help` imports nothing slow.

In reading order:

parser            argparse with suggestions, defaults in help texts and commands loaded on use
security_options  options for API keys, hosts, origins and TLS
serve             `nanovllm serve`
generate          `nanovllm generate`
run_batch         `nanovllm run-batch`
train             `nanovllm train`
models            `nanovllm list`, `show`, `remove` and `env`
bench             `nanovllm bench latency|throughput|serve`
eval              `nanovllm eval`
verify            `nanovllm verify`
train_report      `nanovllm train-report`
visualize         `nanovllm visualize attention|embeddings|logit-lens`
trace             `nanovllm trace`
"""
