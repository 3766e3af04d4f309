#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes: the tests marked gpu, then the benchmarks as tables.
#
#   scripts/gpu_check.sh [WHEELS] [OUT]
#
# WHEELS: a folder of wheels to install first, for a machine without a network; "" for none. OUT: where report.md goes.
# Exits with 1 if a test or a benchmark failed, or the tests were cut off; a benchmark that runs out of its time keeps
# the rows that it had. LIMIT: seconds for all. SHAPE=toy only shows that all of it runs, also on a CPU; PARTS="tests
# samplers" runs some parts only; TOKENIZER=DIR takes a published model's tokenizer in place of the embedded one.
set -uo pipefail
cd "$(dirname "$0")/.."
WHEELS=${1:-} OUT=${2:-runs/gpu_check} SHAPE=${SHAPE:-1.7B} PYTHON=${PYTHON:-python3} TOKENIZER=${TOKENIZER:-}
LIMIT=${LIMIT:-590} PARTS=${PARTS:-machine tests push training samplers rl-native rl-lmdeploy samplers-8B}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=src:${PYTHONPATH:-}
mkdir -p "$OUT"
BATCHES="1 32 128 256"
[ "$SHAPE" = toy ] && BATCHES="1 4"

if [ -n "$WHEELS" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=/tmp/site:$PYTHONPATH
fi

part() { # NAME SECONDS COMMAND…: its output into the report, whatever becomes of it
  local name=$1 limit=$2 began=$SECONDS left=$((LIMIT - SECONDS)) status=0 verdict=ok
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return 0
  if [ $left -lt 20 ]; then
    echo "| $name | not run: $LIMIT seconds are over | |" >>"$OUT/summary.md"
    return 0
  fi
  timeout --kill-after=10 $((limit < left ? limit : left)) "$@" >"$OUT/$name.md" 2>"$OUT/$name.log" || status=$?
  [ $status -eq 0 ] || verdict="failed with $status"
  [ $status -ne 124 ] || verdict="cut off after $((SECONDS - began)) seconds"
  {
    echo "## $name"
    cat "$OUT/$name.md"
    [ $status -eq 0 ] || { echo "$verdict:" && tail -n 15 "$OUT/$name.log"; }
    echo
  } | tee -a "$OUT/report.md"
  echo "| $name | $verdict | $((SECONDS - began)) |" >>"$OUT/summary.md"
}

printf '' >"$OUT/report.md"
printf '| part | verdict | seconds |\n|---|---|--:|\n' >"$OUT/summary.md"
part machine 60 "$PYTHON" -c "from benchmarks.gpu.shapes import machine; print(machine())"
TESTS=$(grep -rlE 'mark\.gpu' tests --include='test_*.py')
"$PYTHON" -c "import hypothesis" 2>/dev/null || TESTS=$(grep -L hypothesis $TESTS) # it may be none of the wheels
part tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=150 -m gpu $TESTS
part push 60 "$PYTHON" -m benchmarks.gpu.push "$SHAPE"
part training 100 "$PYTHON" -m benchmarks.gpu.training "$SHAPE"
part samplers 140 "$PYTHON" -m benchmarks.gpu.sampler "$SHAPE" $BATCHES
part rl-native 110 "$PYTHON" -m benchmarks.gpu.rl_step "$SHAPE" native $TOKENIZER
part rl-lmdeploy 120 "$PYTHON" -m benchmarks.gpu.rl_step "$SHAPE" lmdeploy $TOKENIZER
[ "$SHAPE" = toy ] || part samplers-8B 150 "$PYTHON" -m benchmarks.gpu.sampler 8B 1 32 128
cat "$OUT/summary.md" | tee -a "$OUT/report.md"
! grep -qE "failed|tests \| cut" "$OUT/summary.md"
