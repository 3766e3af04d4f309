#!/usr/bin/env bash
# The whole life of the embedded model on two CPU cores: fine-tune, evaluate, reinforce, evaluate, generate.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
tuned=runs/sft/tiny-arithmetic reinforced=runs/rl/tiny-arithmetic-dipo
stage=0
say() {
  stage=$((stage + 1))
  printf '\n\033[1m[%d/6] $ dirl %s\033[0m\n' "$stage" "$*"
  dirl "$@"
}

cat <<EOT
A model of half a million parameters learns to solve word problems: six stages, six to eight minutes on two quiet
cores, most of them in stages 2 and 4. Stopped with Ctrl-C, the same command goes on where it was.
EOT

say eval model=tiny limit=100
say sft
say eval model=$tuned/model
say rl
say eval model=$reinforced/model
say generate model=$reinforced/model prompt="Tom has 7 pens. Tom buys 5. Tom sells 3. How many pens?"

echo
python "$(dirname "$0")/demo_table.py" \
  "random weights=runs/eval/tiny-arithmetic" \
  "fine-tuned=runs/eval/runs-sft-tiny-arithmetic-model-arithmetic" \
  "reinforced=runs/eval/runs-rl-tiny-arithmetic-dipo-model-arithmetic"
cat <<EOT

Curves     $tuned/loss.png
           $reinforced/rl.png
Models     $tuned/model
           $reinforced/model
Try it     dirl generate model=$reinforced/model watch=true prompt="Emma has 5 eggs. Emma finds 8. Emma eats 2. How many eggs?"
Next       your own data or a published model: docs/quickstart.md
EOT
