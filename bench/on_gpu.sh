#!/usr/bin/env bash
# Everything that needs a GPU, unattended, in under 10 minutes, from a plain checkout: tests, sanitizer, benchmarks.
# Results go to $OUT (default bench/results/). Exits non-zero if a part failed.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=. FUSED_CLR_TEST_GPU=1
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0

# part LOG SECONDS COMMAND...: runs a command under a limit, keeps what it prints, and goes on if it fails.
part() {
    local log=$OUT/$1 limit=$2
    shift 2
    echo "== $*"
    timeout "$limit" "$@" 2>&1 | tee "$log" | tail -40
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "FAILED with $status: $*"; failed=1; }
}

part gpu.txt 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
part gpu-tests.txt 240 "$PYTHON" -m pytest tests/test_gpu.py -q -p no:cacheprovider --durations=10
# After the tests, which have filled triton's cache: a compiler under the sanitizer would take minutes.
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck initcheck; do
        part "$tool.txt" 90 compute-sanitizer --tool "$tool" --launch-timeout 120 --error-exitcode 9 \
            "$PYTHON" -m pytest tests/test_gpu.py -q -p no:cacheprovider -k "eager_steps and float32"
    done
fi
part bench.txt 120 "$PYTHON" -m bench --device cuda --out "$OUT"
exit "$failed"
