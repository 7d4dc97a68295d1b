#!/usr/bin/env bash
# Check the scripts and style sheets of the pages: style, format and types; --write formats them.
# Without npm this does nothing, but in CI it fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if ! command -v npm > /dev/null; then
  echo "The scripts of the pages are not checked: npm is not installed." >&2
  [ -z "${CI:-}" ]
  exit
fi
[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-progress --loglevel=error
cd ../..
bin=tools/javascript/node_modules/.bin
"$bin/biome" check --config-path=tools/javascript/style.json --error-on-warnings "$@" .
"$bin/tsc" --project tools/javascript
