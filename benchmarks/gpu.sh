#!/usr/bin/env bash
# Everything that only a GPU can show, in two calls of at most 280 seconds each on one. From the repository's root, where
# the package's requirements and its dev extra are installed:
#
#     bash benchmarks/gpu.sh             # first call: what the device can do at most; the speed of a step at the real
#                                        # sizes, part by part; a run that resumes in another memory format
#     bash benchmarks/gpu.sh second      # the tests marked gpu (memory against benchmarks.memory, too); compiled code, if
#                                        # it compiles in what is left: else in a call of its own, gpu.sh compiled
#     bash benchmarks/gpu.sh sd          # one part or several, of those below
#     bash benchmarks/gpu.sh --smoke     # both calls in tiny shapes, on any machine, to see that they run
#     PYTHON=python3 RESULTS=/tmp/results PUBLIC=/tmp/consistency_distillation bash benchmarks/gpu.sh
#
# Results are in benchmarks/results/gpu-*.json and .md, or in RESULTS. With PUBLIC, a folder of the public Diffusers
# programs, these run beside ours. Each number is printed and saved when it is measured, the most wanted first; a part
# that fails or takes too long is ended, the others follow. What failed is said at the end, and by the exit status.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RESULTS=${RESULTS:-benchmarks/results}
LIMIT=${LIMIT:-280}   # seconds for a call; whatever is left to do then is left out
smoke=0
[ "${1:-}" = --smoke ] && { smoke=1; shift; }
case ${*:-$([ $smoke = 1 ] && echo both || echo first)} in
both) parts="ceilings sd lora_sdxl layouts tests compiled" ;;
first) parts="ceilings sd lora_sdxl layouts" ;;
second) parts="tests compiled" ;;
*) parts=$* ;;
esac
mkdir -p "$RESULTS"
work=$(mktemp -d)
running=
trap 'rm -rf "$work"' EXIT
trap '[ -n "$running" ] && kill -KILL -- "-$running"; exit 130' INT TERM
export BENCHMARK_STARTED=$(date +%s) PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export HF_HOME="$work/hf" TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"
failed=()

if [ $smoke = 1 ]; then   # SDXL's program, a LoRA and a compiled step, all on the toy
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    LIMIT=3600 processes=2 tiny=--tiny
    sizes=(--warmup 1 --steps 1 --part_steps 1 --mixed_precision bf16)
    formats=()
    sd=(--train_batch_size 2) sdxl=("${sd[@]}") sd_lora=("${sd[@]}" --backend eager)
else
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || failed+=("nvidia-smi")
    processes=8 tiny=
    sizes=(--warmup 2 --steps 6 --part_steps 2 --mixed_precision bf16 --dataloader_num_workers 4)
    formats=(--variant "with channels-last=--channels_last")
    sd=(--teacher sd15 --train_batch_size 16) sdxl=(--teacher sdxl --train_batch_size 4) sd_lora=("${sd[@]}")
    megabytes=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
    if [ "${megabytes:-0}" -le 70000 ]; then   # what 24 GB train
        sd+=(--gradient_checkpointing --use_8bit_adam) sdxl+=(--gradient_checkpointing) formats=()
    fi
fi
[ -n "${PUBLIC:-}" ] && public=(--public "$PUBLIC") || public=()

try() {   # try NAME SECONDS COMMAND…: at the limit the command and all its children are killed, their files removed
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS))
    shift 2
    if [ "$left" -le $((LIMIT / 25)) ]; then   # too little for anything
        failed+=("$name (no time left)")
        return
    fi
    echo "=== $name, ${SECONDS} s after the start"
    mkdir "$work/tmp"
    TMPDIR="$work/tmp" timeout --signal=KILL "$((seconds < left ? seconds : left))" "$@" &
    running=$!   # and the name of the group of processes that timeout makes
    wait "$running"
    local status=$?
    running=
    if [ "$status" != 0 ]; then
        failed+=("$name (status $status)")
        find "$work/tmp" -name program.log -exec tail -n 30 {} \;
    fi
    rm -rf "$work/tmp"
}

step() {   # step NAME SECONDS FLAGS…: one configuration of benchmarks.train_step
    local name=$1 seconds=$2
    shift 2
    [ $smoke = 1 ] && seconds=600
    # A variant starts only if it is likely to end in time; what is killed after all leaves those before it.
    try "$name" "$seconds" "$PYTHON" -m benchmarks.train_step --output "$RESULTS/gpu-train_step.json" \
        --teachers "$work" --rounds 1 --seconds $((SECONDS + seconds - 3)) "${sizes[@]}" "$@"
}

for part in $parts; do
    case $part in
    ceilings) try "what the device can do" 40 "$PYTHON" -m benchmarks.ceilings $tiny \
        --output "$RESULTS/gpu-ceilings.json" ;;
    sd) step "SD 1.5, full" 110 --program sd "${sd[@]}" --straightforward "${public[@]}" \
        "${formats[@]}" --each ;;
    lora_sdxl) step "SDXL, LoRA" $((LIMIT - SECONDS - 50)) --program lora_sdxl "${sdxl[@]}" --straightforward \
        "${public[@]}" --variant "with gradient checkpointing=--gradient_checkpointing" "${formats[@]}" --each ;;
    layouts) try "a resume in another memory format" 60 "$PYTHON" -m pytest -m gpu -q --timeout=60 \
        tests/test_gpu.py -k another_memory_format ;;
    tests) try "tests" 160 "$PYTHON" -m pytest -m gpu -n $processes -v --timeout=90 --durations=5 tests/test_gpu.py ;;
    compiled) step "SD 1.5, LoRA, compiled" $((LIMIT - SECONDS)) --program lora_sd "${sd_lora[@]}" --no_flops \
        --variant compiled=--compile --again ;;
    program) try "a program" 60 "$PYTHON" -m benchmarks.real_size_run --program lora_sd --resolution 512 --steps 5 \
        --train_batch_size 4 --output "$RESULTS/gpu-real_size_run.json" ;;
    sdxl) step "SDXL, full" 200 --program sdxl "${sdxl[@]}" --straightforward ;;
    *) failed+=("$part: no such part") ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all done in $SECONDS s"
