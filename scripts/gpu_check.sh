#!/usr/bin/env bash
# Everything that only a GPU can show, in about ten minutes: the tests marked gpu, then the benchmarks as tables.
#
#   scripts/gpu_check.sh [WHEELS] [OUT]
#
# What is tried is the installed package, which has to be this checkout's. WHEELS: a folder of wheels to install first,
# its own among them, for a machine without a network; "" where `pip install .` has been done. OUT: where report.md
# goes. Every part prints as it goes and is kept, so that a cut loses nothing: the same command again goes on with the
# parts that have not ended well, and on a fresh machine PARTS="training rl-native" names them.
#
# Exits with 1 if a test or a benchmark failed, or the tests were cut off; a benchmark that runs out of its time keeps
# the rows that it had. LIMIT: seconds for all. SHAPE=toy only shows that all of it runs, also on a CPU; TOKENIZER=DIR
# takes a published model's tokenizer in place of the embedded one.
set -uo pipefail
cd "$(dirname "$0")/.."
WHEELS=${1:-} OUT=${2:-runs/gpu_check} SHAPE=${SHAPE:-1.7B} PYTHON=${PYTHON:-python3} TOKENIZER=${TOKENIZER:-}
ALL="machine tests samplers training rl-native kernels push samplers-8B training-8B rl-lmdeploy"
LIMIT=${LIMIT:-590} PARTS=${PARTS:-$ALL}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:${PYTHONPATH:-}
mkdir -p "$OUT"
BATCHES="1 32 128 256"
[ "$SHAPE" = toy ] && BATCHES="1 4"

if [ -n "$WHEELS" ]; then
  SITE=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$SITE:$PYTHONPATH
fi

part() { # NAME SECONDS COMMAND…: what it prints is shown at once and kept, whatever becomes of it
  local name=$1 limit=$2 began=$SECONDS left=$((LIMIT - SECONDS)) status=0 verdict=ok
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return 0
  grep -qs "^| $name | ok |" "$OUT/summary.md" && return 0 # ended well before
  if [ $left -lt 20 ]; then
    verdict="not run: $LIMIT seconds are over"
  else
    echo "## $name"
    timeout --kill-after=10 $((limit < left ? limit : left)) "$@" 2>"$OUT/$name.log" | tee "$OUT/$name.md"
    status=${PIPESTATUS[0]}
    [ $status -eq 0 ] || verdict="failed with $status"
    [[ $status != 124 && $status != 137 ]] || verdict="cut off after $((SECONDS - began)) seconds"
    [ $status -eq 0 ] || { echo "$verdict:" && tail -n 15 "$OUT/$name.log"; } | tee -a "$OUT/$name.md"
    echo
  fi
  sed -i "/^| $name |/d" "$OUT/summary.md"
  echo "| $name | $verdict | $((SECONDS - began)) |" >>"$OUT/summary.md"
}

side_by_side() { # every file of tests in a process of its own: most of their time is the start of engines
  local file name failed=0 jobs=()
  for file in $(grep -rlE 'mark\.gpu' tests --include='test_*.py'); do
    name=$(tr / - <<<"${file%.py}")
    "$PYTHON" -m pytest -p no:cacheprovider -o timeout=150 -m gpu "$file" >"$OUT/$name.txt" 2>&1 &
    jobs+=("$!:$file:$name")
  done
  for job in "${jobs[@]}"; do
    IFS=: read -r pid file name <<<"$job"
    wait "$pid"
    case $? in 0 | 5) ;; *) failed=1 ;; esac # 5: none to run
    echo "$file: $(tail -n 1 "$OUT/$name.txt")"
    grep -E "^(FAILED|ERROR)" "$OUT/$name.txt"
  done
  return $failed
}
export -f side_by_side
export OUT PYTHON

[ -s "$OUT/summary.md" ] || printf '| part | verdict | seconds |\n|---|---|--:|\n' >"$OUT/summary.md"
part machine 60 "$PYTHON" -m benchmarks.gpu.machine
part tests 230 bash -c side_by_side
part samplers 150 "$PYTHON" -m benchmarks.gpu.sampler "$SHAPE" $BATCHES
part training 120 "$PYTHON" -m benchmarks.gpu.training "$SHAPE"
part rl-native 100 "$PYTHON" -m benchmarks.gpu.rl_step "$SHAPE" native $TOKENIZER
part kernels 80 "$PYTHON" -m benchmarks.gpu.kernels "$SHAPE" $BATCHES
part push 60 "$PYTHON" -m benchmarks.gpu.push "$SHAPE"
if [ "$SHAPE" != toy ]; then
  part samplers-8B 120 "$PYTHON" -m benchmarks.gpu.sampler 8B 1 32 128
  part training-8B 90 "$PYTHON" -m benchmarks.gpu.training 8B
fi
part rl-lmdeploy 120 "$PYTHON" -m benchmarks.gpu.rl_step "$SHAPE" lmdeploy $TOKENIZER

for name in $ALL; do
  [ -s "$OUT/$name.md" ] && { echo "## $name" && cat "$OUT/$name.md" && echo; }
done >"$OUT/report.md"
tee -a "$OUT/report.md" <"$OUT/summary.md"
LEFT=$(sed -nE '/\| ok \|/!s/^\| ([a-z][a-zA-Z0-9-]*) \|.*/\1/p' "$OUT/summary.md" | grep -vx part | paste -sd ' ')
[ -z "$LEFT" ] || echo "to go on: SHAPE=$SHAPE PARTS=\"$LEFT\" scripts/gpu_check.sh \"$WHEELS\" \"$OUT\""
! grep -qE "failed|tests \| cut" "$OUT/summary.md"
