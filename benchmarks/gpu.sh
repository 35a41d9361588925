#!/usr/bin/env bash
# Everything that only a GPU can show, in at most nine minutes on one: the tests marked gpu, the speed of a training
# step at the real sizes, what it takes of memory against what benchmarks.memory computes, and one program as a user
# runs it. From the repository's root, where the package is installed:
#
#     bash benchmarks/gpu.sh                  # writes benchmarks/results/gpu-*.json and .md
#     PYTHON=python3 RESULTS=/tmp/results bash benchmarks/gpu.sh
#
# A step that fails or takes too long is left, the others go on; what failed is said at the end, and by the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RESULTS=${RESULTS:-benchmarks/results}
END=$((SECONDS + 530))   # whatever is left to do then is left out
mkdir -p "$RESULTS"
export TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
failed=()

try() {   # try NAME SECONDS COMMAND…
    local name=$1 seconds=$2 left=$((END - SECONDS))
    shift 2
    if [ "$left" -lt 20 ]; then
        failed+=("$name (no time left)")
        return
    fi
    echo "=== $name"
    timeout --kill-after=10 "$((seconds < left ? seconds : left))" "$@" || failed+=("$name (status $?)")
}

step() {   # step NAME SECONDS FLAGS…: one configuration of benchmarks.train_step, against the plain step
    local name=$1 seconds=$2
    shift 2
    try "$name" "$seconds" "$PYTHON" -m benchmarks.train_step --output "$RESULTS/gpu-train_step.json" \
        --mixed_precision bf16 --rounds 1 --warmup 3 --steps 8 --part_steps 4 --straightforward \
        --dataloader_num_workers 4 "$@"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || failed+=("nvidia-smi")
try "tests" 170 "$PYTHON" -m pytest -m gpu -q --durations=5
step "SD 1.5, full" 70 --program sd --teacher sd15 --train_batch_size 16 --use_8bit_adam
step "SDXL, LoRA" 90 --program lora_sdxl --teacher sdxl --train_batch_size 4 --gradient_checkpointing
step "SDXL, full" 110 --program sdxl --teacher sdxl --train_batch_size 4 --gradient_checkpointing --use_8bit_adam
step "SD 1.5, LoRA, compiled" 110 --program lora_sd --teacher sd15 --train_batch_size 16 \
    --variant regional=--compile --variant regional-again=--compile
try "a program" 60 "$PYTHON" -m benchmarks.real_size_run --program lora_sd --resolution 512 --steps 5 \
    --train_batch_size 4 --output "$RESULTS/gpu-real_size_run.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all done in $SECONDS s"
