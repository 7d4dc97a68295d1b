"""The `nanovllm` command. A command is a module, imported when it is used.

A command's module has a function that defines its parser and imports nothing slow, and one that
runs the command and imports what it needs. Most options are fields of dataclasses, which say the
type, the bounds, the default and the help of each. In reading order:

main                the commands; parse the command line, run a command, print errors
parser              argparse with suggestions, and defaults in help texts
options             options made of the fields of settings, and those of several commands
argument_types      argument types, files and messages
environment         environment variables
table               tables on standard output
svg                 charts as SVG
interrupts          signals while code runs that handles them badly
serve               `nanovllm serve`
serve_options       its options, also of a replica under Ray Serve
serving             its application, its sockets and its life
graceful_server     uvicorn's server, with draining and reloading at signals
listening           connection limits and sockets of the server
security_options    API keys, hosts, origins and TLS of the server
reload              API keys and TLS read again at SIGHUP
service_manager     messages to systemd, and the controlling terminal
numa                NUMA nodes: a warning if processors are on several, and a description
generate            `nanovllm generate`
writer              prints completions and answers
repl                the interactive prompt of `generate`
run_batch           `nanovllm run-batch`
train               `nanovllm train`
train_report        `nanovllm train-report`
learn               `nanovllm learn`
lessons             lists steps, judges them, and prints pages and hints
race                `nanovllm learn race`
download            `nanovllm download`
models              `nanovllm list`, `show` and `remove`
env                 `nanovllm env`
bench/              `nanovllm bench`
eval                `nanovllm eval`
ablate              `nanovllm ablate`
verify              `nanovllm verify`
verify_comparison   its comparison
verify_reference    its reference, transformers
visualize           `nanovllm visualize`
drawing             its pictures, and those of `ablate`
trace               `nanovllm trace`
"""
