#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without Ray: correctness, golden numbers, throughput, memory, compile, graphs.
# Writes FOLDER/gpu.json and FOLDER/gpu.md. Try it without a GPU: benchmarks/gpu.sh FOLDER --device cpu --quick
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: benchmarks/gpu.sh FOLDER [--device cpu] [--quick]}
shift
exec "${PYTHON:-python}" -m benchmarks.gpu "$folder" "$@"
