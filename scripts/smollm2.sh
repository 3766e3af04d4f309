#!/usr/bin/env bash
# A causal model becomes a block-diffusion model and is reinforced: SmolLM2-135M-Instruct, GSM8K and the embedded word
# problems. Two hours on two CPU cores, minutes a stage on a GPU; killed, the same command goes on (docs/smollm2.md).
#   scripts/smollm2.sh [cpu|gpu]
# GSM8K_TRAIN, GSM8K_TEST: files, in place of the Hub's openai/gsm8k and Auraithm/GSM8K.
set -eo pipefail   # not -u, which an empty array is too much for in the bash of macOS
root=runs/smollm2 scripts=$(dirname "$0")
say() { printf '\n\033[1m$ dirl %s\033[0m\n' "$*"; dirl "$@"; }
evaluate() { say eval "out=$root/eval/$1" "name=$1" "${@:2}" "${evals[@]}"; }

causal=(model=smollm2 model.block_size=1 decoding=sequential)
words=(bench=arithmetic limit=500)
case ${1:-cpu} in
  cpu)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    # glibc gives memory back to the system after every forward, and takes it again page by page: up to a third of a step here
    export MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 MALLOC_MMAP_MAX_=0
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    gsm8k=(bench=gsm8k limit=200 decoding.max_new_tokens=192)
    evals=(dtype=bfloat16 rollout.max_batch=64) own=(dtype=bfloat16 decoding.max_new_tokens=160)
    convert=() tune=() mix=() reinforce=() reinforce_gsm8k=() ;;
  gpu)
    gsm8k=(bench=gsm8k decoding.max_new_tokens=384)
    evals=(rollout.max_batch=512) own=(decoding.max_new_tokens=384)
    convert=(steps=600 batch_size=64 row_tokens=8192 max_tokens=1024 save_every=100 eval_every=100)
    tune=(steps=600 batch_size=128 row_tokens=8192 save_every=100 eval_every=100)
    mix=(steps=100 batch_size=128 row_tokens=8192 save_every=50)
    reinforce=(steps=60 rl.problems=64 row_tokens=8192 rollout.max_batch=512 save_every=10)
    reinforce_gsm8k=(steps=60 rl.problems=64 row_tokens=8192 rollout.max_batch=512 decoding.max_new_tokens=384 save_every=10) ;;
  *) echo "scripts/smollm2.sh [cpu|gpu]" >&2; exit 1 ;;
esac
if [ -n "$GSM8K_TEST" ]; then gsm8k+=("bench.path=$GSM8K_TEST"); fi

say download model=smollm2
python "$scripts/smollm2_data.py" gsm8k "$root/data" ${GSM8K_TRAIN:+"$GSM8K_TRAIN"}

# The causal model as it is: how well it does, and what it says to questions that it will be trained on.
evaluate causal-gsm8k "${causal[@]}" "${gsm8k[@]}"
evaluate causal-words "${causal[@]}" "${words[@]}"
say generate "${causal[@]}" "input=$root/data/questions.jsonl" instruction=boxed "out=$root/own" "${own[@]}"
python "$scripts/smollm2_data.py" own "$root/data" "$root/own/completions.jsonl"

# To blocks of four.
say sft experiment=smollm2_convert "${convert[@]}"
evaluate converted-gsm8k "model=$root/converted/model" "${gsm8k[@]}"
evaluate converted-words "model=$root/converted/model" "${words[@]}"

# On to word problems: by demonstrations that show the working, by some that mostly do not, and by reward.
say sft experiment=smollm2_words "${tune[@]}"
evaluate words "model=$root/words/model" "${words[@]}"
say sft experiment=smollm2_mixed "${mix[@]}"
evaluate mixed "model=$root/mixed/model" "${words[@]}"
say rl experiment=smollm2_words_rl "${reinforce[@]}"
evaluate words-rl "model=$root/words-rl/model" "${words[@]}"

# And on GSM8K by reward.
say rl experiment=smollm2_gsm8k_rl "${reinforce_gsm8k[@]}"
evaluate gsm8k-rl "model=$root/gsm8k-rl/model" "${gsm8k[@]}"

python "$scripts/smollm2_table.py" "$root"
