#!/usr/bin/env bash
# What needs a GPU, unattended, from a plain checkout, without network: bench/on_gpu.sh [PART...]
#
#   tests           tests/gpu: real captures and replays
#   sanitizer       compute-sanitizer over some of them; best after `tests`, which fills triton's cache
#   quick           a little of every measurement
#   steps-small steps-options steps-models steps-compiled captured loops host
#                   the measurements in full: `pytest bench --part PART`, see bench/parts.py
#   roofline        floors from compiled code beside what the results in $OUT have measured
#
# Each part takes less than 10 minutes; without arguments, `tests sanitizer quick roofline` do so together.
# Results go to $OUT (default bench/results/); one log for all, so that few files have to be brought back. Exits non-zero
# if a part failed. Where there is no .git, FUSED_CLR_COMMIT says which commit this is. Needs pytest and pytest-benchmark.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
LOG=$OUT/on_gpu.txt
mkdir -p "$OUT"
failed=0

# run SECONDS COMMAND...: runs a command under a limit, keeps what it prints, and goes on if it fails.
run() {
    local limit=$1
    shift
    echo "== $*" | tee -a "$LOG"
    # An interrupt, after which pytest writes what it has measured.
    timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee -a "$LOG" | tail -40
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "FAILED with $status: $*" | tee -a "$LOG"; failed=1; }
}

gpu_tests() {
    local limit=$1
    shift
    run "$limit" env FUSED_CLR_TEST_GPU=1 "$@" "$PYTHON" -m pytest tests/gpu -q -p no:cacheprovider \
        --durations=10 "${selection[@]}"
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "no compute-sanitizer: part left out" | tee -a "$LOG"
        return
    fi
    local tool selection=(-k "eager_steps and float32")
    for tool in memcheck initcheck; do
        gpu_tests 75 compute-sanitizer --tool "$tool" --launch-timeout 120 --error-exitcode 9
    done
}

# measure SECONDS PART
measure() {
    run "$1" "$PYTHON" -m pytest bench --part "$2" --device cuda -v --tb=short -p no:cacheprovider \
        --benchmark-columns=median,iqr,rounds --benchmark-json="$OUT/$2-cuda.json"
    run 20 "$PYTHON" -m bench.report "$OUT/$2-cuda.json"
}

: >"$LOG"
run 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
if ! "$PYTHON" -c "import pytest_benchmark"; then
    echo "pytest-benchmark is missing: bring its wheel and put it on PYTHONPATH (pip install --target)" | tee -a "$LOG"
    exit 1
fi
[ "$#" -gt 0 ] || set -- tests sanitizer quick roofline
for part in "$@"; do
    selection=()
    case $part in
        tests) gpu_tests 190 ;;
        sanitizer) sanitizer ;;
        quick) measure 190 quick ;;
        steps-small | steps-options | steps-models | steps-compiled | captured | loops | host) measure 550 "$part" ;;
        roofline)
            shopt -s nullglob
            run 40 "$PYTHON" -m bench.roofline --out "$OUT" --results "$OUT"/*-cuda.json
            ;;
        *)
            echo "no part $part; the first lines of $0 name them" | tee -a "$LOG"
            failed=1
            ;;
    esac
done
exit "$failed"
