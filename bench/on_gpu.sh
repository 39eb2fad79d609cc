#!/usr/bin/env bash
# Everything that a GPU can tell, in ten minutes and offline: build, correctness, benches.
#
#     bench/on_gpu.sh [--minutes 10] [--out gpu-results] [--wheels FOLDER] [--dry-run]
#
# Needs PyTorch with CUDA, and to build: nvcc, g++, setuptools, ninja, pybind11 (or torch's copy of its
# headers). Nothing is downloaded; what is missing is said in summary.txt, and the rest goes on.
# --wheels: packages that the machine may lack (METHOD.md has the command that fetches them), put
# into a folder of their own. Steps are in the order of what one would miss most, each under a limit and all under
# --minutes; every result is written as soon as it exists, so a run that is cut off has lost only
# what it had not come to. The folder stays below 16 MiB: what a step says is cut to its end.
#
# --dry-run: no GPU is used. The PTX emulator stands in, at sizes that tell nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

minutes=10 out=gpu-results wheels= dry=
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --wheels) wheels=$(realpath "$2"); shift 2 ;;
        --dry-run) dry=1; shift ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
done
mkdir -p "$out/logs"
out=$(realpath "$out")
summary=$out/summary.txt
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/minitron-inductor}
python=${PYTHON:-$(command -v python3 || command -v python)}

left() { echo $((minutes * 60 - SECONDS)); }
say() { printf '%4ds  %s\n' "$SECONDS" "$*" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...: under LIMIT seconds and those that are left; its output in logs/NAME.log
step() {
    local name=$1 limit=$2 log=$out/logs/$1.log rc
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    [ "$limit" -gt 2 ] || { say "$name: no time left"; return 1; }
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$log" 2>&1
    rc=$?
    tail -c 200000 "$log" >"$log.end" && mv "$log.end" "$log"
    case $rc in
        0) say "$name: done. $(last_line "$log")" ;;
        124 | 130 | 137)
            say "$name: cut off after ${limit}s. $(grep -oE '^[^ ]+\.py::[^ ]+' "$log" | tail -n 1) $(last_line "$log")" ;;
        *) say "$name: FAILED ($rc). $(last_line "$log")" ;;
    esac
    return $rc
}
last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | cut -c 1-200; }
missing_of() { # MODULES...: those that are not there
    "$python" - "$@" <<'PYTHON'
import sys
from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if find_spec(name) is None])
PYTHON
}
has() { [ -z "$(missing_of "$1")" ]; }

# ---- what there is

: >"$summary"
say "minitron_kernels $(git rev-parse --short=12 HEAD 2>/dev/null), $(date -u '+%F %T') UTC, ${minutes} minutes"
{
    uname -a
    nvidia-smi
    nvcc --version
    "$python" -VV
    "$python" -m pip list
    "$python" -c 'import torch; print(torch.__config__.show())'
} >"$out/environment.txt" 2>&1
has torch || { say "PyTorch is not there ($python)"; exit 1; }
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    step wheels 30 "$python" -m pip install --no-index --no-deps --target "$site" "$wheels"/*.whl
    PYTHONPATH=$PYTHONPATH:$site
fi
if [ -z "$dry" ]; then
    arch=$("$python" bench/device_arch.py) || { say "no CUDA device that kernels are built for: $arch"; exit 1; }
    say "device: $(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader | head -n 1), kernels for $arch"
fi
say "not installed: $(missing_of pytest pytest_benchmark hypothesis scipy transformers gguf safetensors \
    tokenizers huggingface_hub jinja2 psutil click tqdm filelock matplotlib triton flash_attn \
    flashinfer liger_kernel llama_cpp)"

has hypothesis || PYTHONPATH=$PYTHONPATH:$PWD/bench/stand_ins # its tests are skipped then

# ---- build

if [ -n "$dry" ]; then
    say "build: what is there is used"
else
    say "build: not installed: $(missing_of setuptools ninja pybind11); on PATH:" \
        "$(command -v nvcc g++ ninja | tr '\n' ' ')"
    step build 170 env MK_ARCHS="$arch" "$python" setup.py build_ext --inplace
fi
if ! "$python" -c 'from minitron_kernels import native; native.get_library()' 2>/dev/null; then
    say "there is no native layer, built now or before: nothing to run (logs/build.log)"
    exit 1
fi

# ---- correctness

# -v: if a kernel hangs, the log ends with the name of the test that ran it, and its stack.
pytest() { "$python" -m pytest -p no:cacheprovider -v --color=no --tb=short --continue-on-collection-errors \
    -o faulthandler_timeout=15 "$@"; }
export -f pytest
export python
run_tests() { # NAME LIMIT ARGUMENTS OF PYTEST...
    local name=$1 limit=$2
    shift 2
    has pytest || { say "$name: pytest is not installed"; return 1; }
    step "$name" "$limit" bash -c 'pytest "$@"' _ --junitxml="$out/$name.xml" "$@"
}
# A few cases of every op (tests/test_on_gpu.py holds this list against the C ABI's). A process for each group:
# a kernel that hangs, or touches what it may not, ends all that follows it in its own.
short_groups=(rows attention linear fp8 quant)
short_tests=("tests/test_cuda_ops.py tests/test_kernels_memory.py"
    "tests/test_cuda_attention.py tests/test_attention_fp8.py"
    "tests/test_linear.py" "tests/test_linear_fp8.py"
    "tests/test_quant_decode.py tests/test_quant_gemm.py tests/test_quant_embedding.py")
short_names="test_norms or test_rope_and_append or test_silu_and_embedding or test_swiglu_mlp
    or test_attention or test_argmax or test_sampling_equals or test_linear_of_any_strides
    or test_qkv_rope_append or test_qkv_of_three_types or test_rows_have_ggufs_bits
    or test_large_tile or test_extreme_blocks or test_norm_residual_and_swiglu
    or test_quantize_edges or test_writes_vectors"
short_names=$(echo $short_names)  # on one line
if [ -n "$dry" ]; then
    run_tests tests-short 100 -m "not slow" -k "test_norms and emu-sm_80" tests/test_cuda_ops.py
else
    for i in "${!short_groups[@]}"; do
        # shellcheck disable=SC2086  # several files
        run_tests "tests-${short_groups[i]}" 30 -m "gpu and not slow" -k "$short_names" ${short_tests[i]}
    done
    run_tests tests-rest 90 -m "gpu and not slow" tests
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            step "sanitizer-$tool" 25 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest \
                -p no:cacheprovider -q -m gpu -k "test_norms or test_attention" \
                tests/test_cuda_ops.py tests/test_cuda_attention.py
        done
    else
        say "compute-sanitizer is not there"
    fi
fi

# ---- benches, the most wanted first

device=(--device cuda) speed=(--seconds 0.3)
[ -z "$dry" ] || device=(--device emulated) speed=(--smoke)
bench() { # NAME LIMIT FILES AND OPTIONS...
    local name=$1 limit=$2
    shift 2
    has pytest_benchmark || { say "$name: pytest-benchmark is not installed"; return 1; }
    step "$name" "$limit" bash -c 'pytest "$@"' _ --benchmark-columns=median "${device[@]}" "${speed[@]}" \
        --out "$out/ops-$name.jsonl" "$@"
}
model() { # WEIGHTS LIMIT OPTIONS...
    local weights=$1 limit=$2
    shift 2
    step "model-$weights" "$limit" "$python" -m bench.whole_model --weights "$weights" \
        --json "$out/model-$weights.json" "$@"
}
if [ -n "$dry" ]; then
    bench dry 100 bench/bench_attention_decode.py bench/bench_linear_quant.py --only kind=Q4_K
    model Q4_K 60 --small --device emulated:sm_80 --prompt 8 --generate 3 --batch 1 --repeat 1
else
    bench decode 40 bench/bench_attention_decode.py --only dtype=bfloat16 --no-compile
    bench quant 60 bench/bench_linear_quant.py --only kind=Q4_K,Q6_K,Q8_0,Q4_0 --only quant_m=1,8,64
    model Q4_K 60 --device cuda --repeat 3
    bench linear 45 bench/bench_linear.py --only dtype=bfloat16 --only m=1,16,64,2048
    bench prefill 30 bench/bench_attention_prefill.py --only dtype=bfloat16 --no-compile
    bench layer 40 bench/bench_layer.py --only dtype=bfloat16
    model dense 45 --device cuda --repeat 3
    bench rows 60 bench/bench_rms_norm.py bench/bench_add_rms_norm.py bench/bench_rope.py \
        bench/bench_silu_and_mul.py --only dtype=bfloat16 --only rows=1,64,2048
    bench calls 20 bench/bench_call_overhead.py
    bench rest 600 bench
    [ "$(left)" -lt 60 ] || step build-all 600 env MK_ARCHS="80 89 90a 100a" "$python" setup.py build_ext \
        --build-lib "${TMPDIR:-/tmp}/minitron-all-archs"
fi
if has matplotlib && [ "$(left)" -gt 5 ] && [ -z "$dry" ]; then
    cp bench/results/modelled.json "$out/"
    step report 30 "$python" -m bench.report --results "$out" --out "$out/performance.md"
fi
say "finished; $(du -sk "$out" | cut -f 1) KiB in $out"
