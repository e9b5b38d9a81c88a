#!/usr/bin/env bash
# The one command for a machine with a GPU: build, GPU tests, benchmarks, most valuable first.
#
#   bash benchmarks/gpu.sh OUT          # kernels: build, tests, attention, the other ops
#   bash benchmarks/gpu.sh OUT inference # then: fused blocks, whole models, compiled ones beside them
#   bash benchmarks/gpu.sh OUT models   # then: norms, modules, training steps, SHP, augmentation
#   bash benchmarks/gpu.sh OUT training # then: images/s of whole training runs, beside other routes
#
# Needs python3 with torch, triton, pytest and pytest-benchmark; no network. Every stage has its
# own time limit, a failed stage does not stop the next, and each writes into OUT as it goes:
# log.txt, info.txt, <stage>.txt, <stage>.json, and results/ for `python -m benchmarks.report`.
# Each of the four takes less than 9 minutes.
set -uo pipefail
part=${2:-kernels}
case "$#-$part" in 1-kernels | 2-kernels | 2-models | 2-training | 2-inference) ;; *)
    echo "usage: bash benchmarks/gpu.sh OUT [kernels|inference|models|training]" >&2
    exit 2
    ;;
esac
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=()
tests_passed=--tests-passed # where they did not, every benchmark runs its op's tests first
for module in torch triton pytest pytest_benchmark; do
    python3 -c "import $module" 2>/dev/null || { echo "error: python3 has no $module" >&2; exit 2; }
done

stage() { # stage NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS rc
    shift 2
    # at an interrupt pytest still writes what it has measured
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
    rc=$?
    echo "$name: exit $rc after $((SECONDS - start)) s (limit $limit s)" | tee -a "$out/log.txt"
    if [ $rc -ne 0 ]; then
        failed+=("$name")
        tail -n 15 "$out/$name.txt"
    fi
}

bench() { # bench OP SECONDS
    stage "bench_$1" "$2" python3 -m pytest "benchmarks/bench_$1.py" -q --benchmark-only \
        $tests_passed \
        --benchmark-json="$out/$1.json" --benchmark-columns=median,iqr,rounds \
        --benchmark-group-by=group --benchmark-max-time=0.3 --benchmark-min-rounds=3
}

: >>"$out/log.txt"
if [ "$part" = kernels ] || [ ! -e lsmha_fast/_C_cuda.abi3.so ]; then
    stage build 90 env LSMHA_BUILD=auto TORCH_CUDA_ARCH_LIST=9.0a python3 setup.py build_ext --inplace
fi
if [ "$part" = kernels ]; then
    stage info 20 python3 -m lsmha_fast.info
    # the kernels of a test are compiled on first use: more processes compile more at a time
    workers=$(python3 -c 'import xdist; print("-n 8")' 2>/dev/null)
    stage tests 150 python3 -m pytest tests -m gpu -q --maxfail=10 $workers
    [[ " ${failed[*]} " != *" tests "* ]] || tests_passed=
    bench attention 120
    stage pipes 25 bash -c 'nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a \
        -o "$0/pipes.bin" benchmarks/pipes.cu && "$0/pipes.bin" >"$0/pipes.json"; rc=$?
        rm -f "$0/pipes.bin"; exit $rc' "$out"
    bench head_class_sums 35
    bench conv_stem 45
    bench seq_pool 35
elif [ "$part" = training ]; then
    bench train_loop 420
elif [ "$part" = inference ]; then
    bench block 75
    bench inference 330
else
    bench residual_norm 60
    bench host_overhead 20
    bench modules 60
    bench attention_weights 30
    bench train_step 110
    bench shp 60
    bench augment 45
fi
for json in "$out"/*.json; do
    [ "${json##*/}" = pipes.json ] || [ ! -s "$json" ] ||
        python3 -m benchmarks.record "$json" --results "$out/results" >>"$out/log.txt" 2>&1
done

echo "results in $out"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
