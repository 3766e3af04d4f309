#!/usr/bin/env bash
# The whole life of the embedded model on two CPU cores: fine-tune, evaluate, reinforce, evaluate, generate.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
tuned=runs/sft/tiny-arithmetic reinforced=runs/rl/tiny-arithmetic-dipo
say() { printf '\n\033[1m$ dirl %s\033[0m\n' "$*"; dirl "$@"; }

say eval model=tiny limit=100
say sft
say eval model=$tuned/model
say rl
say eval model=$reinforced/model
say generate model=$reinforced/model prompt="Tom has 7 pens. Tom buys 5. Tom sells 3. How many pens?"

python "$(dirname "$0")/demo_table.py" \
  "random weights=runs/eval/tiny-arithmetic" \
  "fine-tuned=runs/eval/runs-sft-tiny-arithmetic-model-arithmetic" \
  "reinforced=runs/eval/runs-rl-tiny-arithmetic-dipo-model-arithmetic"
