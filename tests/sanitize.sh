#!/bin/bash
# compute-sanitizer over the tests of the CUDA kernels: memcheck and racecheck, all groups side by side on one GPU.
#
#     bash tests/sanitize.sh [FOLDER FOR LOGS]
#
# Run `pytest -m gpu` before, so that Triton has compiled its kernels: under the sanitizer that would take very long.
# Small shapes of every width, mode and body; PyTorch's allocator is off, because memcheck cannot see inside its pool.
set -u
logs=${1:-sanitizer}
mkdir -p "$logs"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1

names=(gemv gemm dequantize attention small step)
tests=(
    "tests/test_cuda_gemv.py -k '96-32 or 200-128 or one_hot or factor'"
    "tests/test_cuda_gemm.py -k '192-64 and tensor or one_hot or slices'"
    "tests/test_cuda_dequantize.py -k '96-32 or 200-128'"
    "tests/test_cuda_attention.py"
    "tests/test_cuda_norm.py tests/test_cuda_rotate.py tests/test_cuda_sample.py tests/test_cuda_delta.py"
    "tests/test_cuda_step.py -k 'exact_step and (qwen2 or qwen3_5)'"
)
for tool in memcheck racecheck; do
    for i in "${!names[@]}"; do
        log="$logs/$tool-${names[$i]}.log"
        eval timeout "${SANITIZE_SECONDS:-1500}" compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
            python3 -m pytest -m gpu -p no:xdist -p no:cacheprovider "${tests[$i]}" >"$log" 2>&1 &
    done
done
wait

failed=0
for log in "$logs"/*.log; do
    summary=$(grep -hE "ERROR SUMMARY|RACECHECK SUMMARY" "$log" | sed 's/=* //')
    passed=$(grep -hE "[0-9]+ passed" "$log" | tail -1)
    echo "$(basename "$log" .log): ${passed:-no result}; ${summary:-no summary}"
    grep -qE "SUMMARY: 0 (errors|hazards)" "$log" && grep -q passed "$log" && ! grep -q failed "$log" || failed=1
done
exit $failed
