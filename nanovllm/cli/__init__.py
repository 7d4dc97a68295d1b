"""The `nanovllm` command, a module for each subcommand.

In reading order:

main              parse the command line, run a command, print errors
parsers/          the commands' argument parsers, quick to import
options           options shared by several commands
argument_types    argument types, files and messages
environment       environment variables
table             tables on standard output
serve             `nanovllm serve`
graceful_server   uvicorn's server, with draining and reloading at signals
listening         connection limits and sockets of the server
security_options  API keys, hosts, origins and TLS of the server
reload            API keys and TLS read again at SIGHUP
service_manager   messages to systemd, and the controlling terminal
interrupts        Ctrl-C that ends calls of libraries at once
numa              a warning for processors on several NUMA nodes
generate          `nanovllm generate`
repl              the interactive prompt of `generate`
run_batch         `nanovllm run-batch`
train             `nanovllm train`
download          `nanovllm download`
models            `nanovllm list`, `show` and `remove`
env               `nanovllm env`
bench/            `nanovllm bench`
eval              `nanovllm eval`
verify            `nanovllm verify`
verify_reference  the transformers reference of `verify`
train_report      `nanovllm train-report`
visualize         `nanovllm visualize`
trace             `nanovllm trace`
"""
