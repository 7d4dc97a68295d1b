#!/bin/sh
# Write constraints.txt: the versions of all packages in the image, on every platform.
# UV is the uv program (make constraints installs one).
set -eu
cd "$(dirname "$0")/.."
sed -n 's/^requires = \["\(.*\)"\]$/\1/p' pyproject.toml |  # the build tool
    "${UV:-uv}" pip compile --quiet --upgrade pyproject.toml - --extra ray \
        --universal --python-version 3.11 --no-annotate \
        --custom-compile-command 'make constraints' --output-file deploy/constraints.txt
