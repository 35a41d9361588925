#!/usr/bin/env bash
# Everything that only a GPU can show, in at most nine minutes on one: the speed of a training step at the real sizes,
# the tests marked gpu (memory against what benchmarks.memory computes, too), a program as a user runs it, compiled code.
# From the repository's root, where the package's requirements are installed:
#
#     bash benchmarks/gpu.sh                  # writes benchmarks/results/gpu-*.json and .md
#     bash benchmarks/gpu.sh sdxl compiled    # of these parts only: sd lora_sdxl tests program sdxl compiled
#     PYTHON=python3 RESULTS=/tmp/results bash benchmarks/gpu.sh
#
# A part that fails or takes too long is left, the others go on; what was measured until then is kept. What failed is
# said at the end, and by the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RESULTS=${RESULTS:-benchmarks/results}
LIMIT=${LIMIT:-530}   # seconds for everything; whatever is left to do then is left out
parts=${*:-sd lora_sdxl tests program sdxl compiled}
mkdir -p "$RESULTS"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export HF_HOME="$work/hf" TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"
failed=()

try() {   # try NAME SECONDS COMMAND…: at the limit the command and all its children are killed, their files removed
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS))
    shift 2
    if [ "$left" -le $((LIMIT / 25)) ]; then   # too little for anything
        failed+=("$name (no time left)")
        return
    fi
    echo "=== $name"
    mkdir "$work/tmp"
    TMPDIR="$work/tmp" timeout --signal=KILL "$((seconds < left ? seconds : left))" "$@" || failed+=("$name (status $?)")
    rm -rf "$work/tmp"
}

step() {   # step NAME SECONDS FLAGS…: one configuration of benchmarks.train_step, against the plain step
    local name=$1 seconds=$2
    shift 2
    try "$name" "$seconds" "$PYTHON" -m benchmarks.train_step --output "$RESULTS/gpu-train_step.json" \
        --teachers "$work" --mixed_precision bf16 --rounds 1 --warmup 3 --steps 8 --part_steps 4 --straightforward \
        --dataloader_num_workers 4 "$@"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || failed+=("nvidia-smi")
megabytes=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
large=$((${megabytes:-0} > 70000))   # 24 GB cards train a full SD student with these flags, a full SDXL one never
sparing=()
[ "$large" = 1 ] || sparing=(--gradient_checkpointing --use_8bit_adam)

for part in $parts; do
    case $part in
    sd) step "SD 1.5, full" 140 --program sd --teacher sd15 --train_batch_size 16 "${sparing[@]}" \
        --each "channels-last on GPUs" "half networks without autocast" ;;
    lora_sdxl) step "SDXL, LoRA" 150 --program lora_sdxl --teacher sdxl --train_batch_size 4 \
        --gradient_checkpointing ;;
    tests) try "tests" 200 "$PYTHON" -m pytest -m gpu -q --durations=5 tests/test_gpu.py ;;
    program) try "a program" 60 "$PYTHON" -m benchmarks.real_size_run --program lora_sd --resolution 512 --steps 5 \
        --train_batch_size 4 --output "$RESULTS/gpu-real_size_run.json" ;;
    sdxl) [ "$large" = 1 ] && step "SDXL, full" 200 --program sdxl --teacher sdxl --train_batch_size 4 \
        --gradient_checkpointing ;;
    compiled) step "SD 1.5, LoRA, compiled" 250 --program lora_sd --teacher sd15 --train_batch_size 16 --no_flops \
        --variant regional=--compile --variant regional-again=--compile ;;
    *) failed+=("$part: no such part") ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all done in $SECONDS s"
