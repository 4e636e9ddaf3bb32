#!/bin/bash
# On a GPU: the checks of the kernels and of the training step, then what docs/numbers.md says of a GPU. Six minutes on an
# H200.
#     bash results/benchmark/gpu.sh runs/gpu [pytorch-image-models]
# With a clone of timm's repository, its train.py beside ours, too; a minute or two more.
set -euo pipefail
output=${1:?folder for tables and pictures}
python -m tests.layers.test_poca_triton cuda
python -m pytest -q -n 0 -m gpu tests/training
for dtype in float32 bfloat16; do
    python scripts/benchmark.py head --device cuda --dtype $dtype --repeats 5 --output "$output"
    python scripts/benchmark.py pairs --device cuda --dtype $dtype --repeats 3 --output "$output"
done
if [ -n "${2:-}" ]; then
    python results/benchmark/engines.py --timm "$2" --output "$output/engines.json"
fi
