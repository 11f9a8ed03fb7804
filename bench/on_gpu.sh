#!/usr/bin/env bash
# What needs a GPU, unattended, from a plain checkout, without network: bench/on_gpu.sh [PART...]
#
#   tests           tests/test_gpu.py: real captures and replays
#   sanitizer       compute-sanitizer over some of them; best after `tests`, which fills triton's cache
#   quick           a little of every measurement
#   steps-small steps-options steps-models steps-compiled captured loops host
#                   the measurements in full: parts of `python -m bench`, see bench/parts.py
#   roofline        floors from compiled code beside what the results in $OUT have measured
#
# Each part takes less than 10 minutes; without arguments, `tests sanitizer quick roofline` do so together.
# Results go to $OUT (default bench/results/); one log for all, so that few files have to be brought back. Exits non-zero
# if a part failed. Where there is no .git, FUSED_CLR_COMMIT says which commit this is.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
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
    timeout "$limit" "$@" 2>&1 | tee -a "$LOG" | tail -40
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "FAILED with $status: $*" | tee -a "$LOG"; failed=1; }
}

gpu_tests() {
    local limit=$1
    shift
    run "$limit" env FUSED_CLR_TEST_GPU=1 "$@" "$PYTHON" -m pytest tests/test_gpu.py -q -p no:cacheprovider \
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

roofline() {
    shopt -s nullglob
    run 40 "$PYTHON" -m bench.roofline --out "$OUT" --results "$OUT"/*-cuda.json
}

: >"$LOG"
run 10 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
[ "$#" -gt 0 ] || set -- tests sanitizer quick roofline
for part in "$@"; do
    selection=()
    case $part in
        tests) gpu_tests 190 ;;
        sanitizer) sanitizer ;;
        quick) run 190 "$PYTHON" -m bench --part quick --device cuda --out "$OUT" ;;
        steps-small | steps-options | steps-models | steps-compiled | captured | loops | host)
            run 570 "$PYTHON" -m bench --part "$part" --device cuda --out "$OUT"
            ;;
        roofline) roofline ;;
        *)
            echo "no part $part; the first lines of $0 name them" | tee -a "$LOG"
            failed=1
            ;;
    esac
done
exit "$failed"
