#!/usr/bin/env bash
# Tests and measurements on one NVIDIA GPU, in at most 13 minutes:
#
#     bash benchmarks/gpu.sh [--dry-run | --cpu-check] [RESULTS [STEP ...]]
#
# The steps run in order of importance, or only those named. The output of a step is in RESULTS/results.md (default
# gpu_results) while it runs, its error messages are in RESULTS/log.txt. A step that fails or exceeds its budget does not
# stop those after it. Training of the scenes uses the time that is left, and SIGTERM makes it save.
#
# --dry-run    print the budgets and commands of the steps, and run nothing
# --cpu-check  run every step at a tiny size on the CPU
#
# Variables:
#   PYTHON       interpreter with the package's requirements and jax[cuda] (python3)
#   PEER_PYTHON  interpreter with torch, and with diffusers for the U-Net; without them no peers are measured (PYTHON)
#   LIMIT        seconds of all steps together (780)
#   RUNS         directory for the runs of the scenes (RESULTS/runs)
set -u

mode=run
case "${1:-}" in
    --dry-run | --cpu-check) mode=${1#--} && shift ;;
    -*) echo "Expected --dry-run or --cpu-check, got $1." >&2 && exit 2 ;;
esac
results=${1:-gpu_results}
shift $(($# > 0))
only=" $* "

[ "$mode" = dry-run ] || mkdir -p "$results" || exit
[ "$mode" = dry-run ] || results=$(cd "$results" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}
peer_python=${PEER_PYTHON:-$python}
runs=${RUNS:-$results/runs}
limit=${LIMIT:-780}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-8}"
no_command_buffers="XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_enable_command_buffer="

sampler_peer=() train_peer=() unet_peer=()
imports() { [ "$mode" = dry-run ] || "$peer_python" -c "import $1" 2>/dev/null; }
imports torch && sampler_peer=(--peers torch --peer-python "$peer_python") train_peer=(--peer-python "$peer_python")
imports torch,diffusers && unet_peer=(--peer-python "$peer_python")

# Sizes: of the samplers, the batches, and flags of the configurations.
large=(--dim 2048 --layers 24 --heads 32 --codes 16384) medium=(--dim 1024 --layers 24 --heads 16 --codes 16384)
batches=(1 8 64) repeats=2 steps=10
dalle=(--model.dim 2048 --model.layers 24 --model.heads 32 --data.batch-size 16)
cudnn=cudnn unet=() dvae=(--data.batch-size 32)
scenes_dvae=(--steps 2500 --model.tau.steps 2500 --eval-every 2500 --sample-every 2500 --data.num-workers 12)
scenes_dalle=(--steps 6000 --sample-every 6000 --data.num-workers 14 --text.num-train-captions 20000)
if [ "$mode" = cpu-check ]; then
    export JAX_PLATFORMS=cpu TORCHDYNAMO_DISABLE=1 # without compilation, which takes the peers a minute
    limit=3000
    tiny=(--dim 32 --layers 2 --heads 2 --text-len 8 --grid 4 --codes 64 --top-k 8)
    large=("${tiny[@]}") medium=("${tiny[@]}") batches=(2) repeats=1 steps=1
    dalle=(--model.dim 32 --model.layers 2 --model.heads 2 --model.grid 4 --model.text-len 8 --data.batch-size 2)
    cudnn=auto # cuDNN needs a GPU
    unet=(--model.width 32 --model.channel-multipliers 1 2 --model.attention-sizes 16 --model.blocks 1 --data.batch-size 2)
    dvae=(--model.width 16 --model.decoder-width 16 --model.image-size 32 --model.vocab 64 --model.blocks 1 --data.batch-size 2)
    scenes_dvae=(
        --steps 2 --eval-every 2 --sample-every 2 --eval-rows 8 --data.batch-size 8 --data.num-workers 1
        --model.width 8 --model.decoder-width 8 --model.blocks 1
    )
    scenes_dalle=(
        --steps 2 --eval-every 2 --sample-every 2 --eval-rows 8 --data.batch-size 8 --data.num-workers 1
        --text.num-train-captions 1000 --model.dim 32 --model.layers 2 --model.heads 2
    )
fi

budgets=0 failed=0

# step NAME BUDGET COMMAND ... runs a command for at most BUDGET seconds. Processes that it started end with it.
step() {
    local name=$1 budget=$2 group=()
    shift 2
    [[ $only = "  " || $only = *" $name "* ]] || return 0
    budgets=$((budgets + budget))
    if [ "$mode" = dry-run ]; then
        printf '%s\t%d\t%s\n' "$name" "$budget" "$(printf '%q ' "$@")"
        return
    fi
    [ "$mode" = cpu-check ] && budget=$((4 * budget)) # a CPU with other work
    # A second SIGTERM would stop training without a checkpoint, so only its main process gets the signal.
    local grace=5
    [[ $name = scenes_* ]] && group=(--foreground) && grace=15
    local left=$((limit - SECONDS)) begin=$SECONDS
    [ $left -lt "$budget" ] && budget=$left
    printf '\n## %s\n\n`%s`\n\n' "$name" "$*" >>"$results/results.md"
    if [ "$budget" -lt $((grace + 5)) ]; then
        echo "Not run: $left s are left." | tee -a "$results/results.md"
        return
    fi
    echo "== $name" >>"$results/log.txt"
    timeout "${group[@]}" -k $grace $((budget - grace)) "$@" >>"$results/results.md" 2>>"$results/log.txt"
    local code=$? outcome
    case $code in
        0) outcome=finished ;;
        124 | 137) outcome="stopped at its limit" ;;
        *) outcome="failed with exit code $code" && failed=1 ;;
    esac
    printf '\n%s %s after %d s.\n' "$name" "$outcome" $((SECONDS - begin)) | tee -a "$results/results.md"
}

# step_of_rest NAME BUDGET PART COMMAND ... is a step that may use a PART-th of the seconds left if these are more.
step_of_rest() {
    local name=$1 budget=$2 rest=$(((limit - SECONDS) / $3))
    shift 3
    [ "$mode" = run ] && [ $rest -gt "$budget" ] && budget=$rest
    step "$name" "$budget" "$@"
}

step environment 15 "$python" -m benchmarks.report
step gpu_tests 70 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py

full=(--model.attention full --model.last-attention None)
sample=("$python" -m benchmarks.sample --models full --dtypes bfloat16 --repeats $repeats --batch "${batches[@]}")
train=("$python" -m benchmarks.train)
timed=(--dtypes bfloat16 --steps $steps)

step sample_1.3b 160 "${sample[@]}" "${large[@]}" "${sampler_peer[@]}"
step train_1.3b_dense 115 "${train[@]}" configs/dalle_12b.py "${full[@]}" "${dalle[@]}" \
    --model.attention-kernel dense "${timed[@]}" "${train_peer[@]}"
step train_1.3b_cudnn 55 "${train[@]}" configs/dalle_12b.py "${full[@]}" "${dalle[@]}" \
    --model.attention-kernel $cudnn "${timed[@]}"
step sample_1.3b_no_command_buffers 75 env "$no_command_buffers" "${sample[@]}" "${large[@]}"
step train_unet 70 "${train[@]}" configs/ddpm_cifar10.py "${unet[@]}" "${timed[@]}" "${unet_peer[@]}"
step sample_350m 80 "${sample[@]}" "${medium[@]}" "${sampler_peer[@]}"
step sample_350m_no_command_buffers 40 env "$no_command_buffers" "${sample[@]}" "${medium[@]}"
step train_dvae 45 "${train[@]}" configs/dvae_openai.py "${dvae[@]}" "${timed[@]}" "${train_peer[@]}"

# Training of the scenes in the seconds that are left: a third for the tokenizer, and what remains for the Transformer.
step_of_rest scenes_dvae 25 3 "$python" train.py configs/scenes_dvae.py --run "$runs/scenes_dvae" "${scenes_dvae[@]}"
step_of_rest scenes_dalle 30 1 "$python" train.py configs/scenes_dalle.py --run "$runs/scenes_dalle" \
    --image-tokenizer "$runs/scenes_dvae" "${scenes_dalle[@]}"
for name in scenes_dvae scenes_dalle; do
    [ "$mode" != dry-run ] && [ -f "$runs/$name/metrics.jsonl" ] && cp "$runs/$name/metrics.jsonl" "$results/$name.jsonl"
done

if [ "$mode" = dry-run ]; then
    printf 'all\t%d\n' $budgets
else
    echo "All steps took $SECONDS s. $results/results.md has the results."
fi
exit $failed
