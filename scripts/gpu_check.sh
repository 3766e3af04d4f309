#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes: the tests marked gpu, then the benchmarks as tables.
#
#   scripts/gpu_check.sh [WHEELS] [TOKENIZER] [OUT]
#
# WHEELS: a folder of wheels to install first, for a machine without a network. TOKENIZER: the directory of a published
# model's tokenizer. OUT: where the report goes. With SHAPE=toy it only shows that all of it runs.
set -uo pipefail
cd "$(dirname "$0")/.."
WHEELS=${1:-} TOKENIZER=${2:-} OUT=${3:-runs/gpu_check} SHAPE=${SHAPE:-1.7B}
export PYTHONUNBUFFERED=1 LMDEPLOY_ENABLE_CHECK_ENV=0 TOKENIZERS_PARALLELISM=false
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

if [ -n "$WHEELS" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=/tmp/site:src:${PYTHONPATH:-}
fi

run() { # NAME SECONDS COMMAND…: its output into the report, whatever becomes of it
  local name=$1 limit=$2
  shift 2
  echo "## $name"
  local began=$SECONDS
  timeout "$limit" "$@" 2>"$OUT/stderr" || { echo "failed with $?:"; tail -n 15 "$OUT/stderr"; }
  echo "($((SECONDS - began)) s)"
}

{
  run "machine" 60 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  run "tests" 240 "$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=200 -m gpu tests/test_gpu.py
  run "training" 120 "$PYTHON" benchmarks/gpu/training.py "$SHAPE"
  if [ -n "$TOKENIZER" ]; then
    run "samplers" 200 "$PYTHON" benchmarks/gpu/sampler.py "$TOKENIZER" "$SHAPE" 1 8 128
    run "a step of rl, native" 100 "$PYTHON" benchmarks/gpu/rl_step.py "$TOKENIZER" "$SHAPE" native
    run "a step of rl, LMDeploy" 100 "$PYTHON" benchmarks/gpu/rl_step.py "$TOKENIZER" "$SHAPE" lmdeploy
  fi
} 2>&1 | tee "$OUT/report.md"
