#!/usr/bin/env bash
# All GPU tests and benchmarks in one call, in under ten minutes:  benchmarks/on_gpu.sh [FOLDER]
#
# Needs torch, Triton, numpy, pytest and, for the native kernels, pybind11 and a C++ compiler; pytest-xdist makes the tests
# faster. What needs diffusers skips with its reason. Records and logs go to FOLDER, by default benchmarks/results, each as
# soon as it is there. A step that fails, the build too, lets the others run and makes the exit status 1; the limits add up
# to 595 seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$out"
export PYTHONPATH=$PWD
python=${PYTHON:-python3}

$python - <<'EOF' || exit 1
import sys
try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"on_gpu.sh: {sys.executable} has no torch; PYTHON=... names another")
if not torch.cuda.is_available():
    sys.exit("on_gpu.sh: torch sees no GPU")
print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
EOF
failed=0
step() {  # name, seconds, command: a log for each, and the run goes on after a failure
  local name=$1 limit=$2
  shift 2
  echo "== $name (at most $limit s): $*"
  timeout "$limit" "$@" > "$out/gpu_$name.log" 2>&1
  local code=$?
  tail -n 25 "$out/gpu_$name.log"
  if [ $code -ne 0 ]; then echo "== $name failed with $code"; failed=1; fi
}

has() { $python -c "import $1" 2> /dev/null; }

# The build itself never fails, so that dpfast installs without a compiler: whether it worked shows in the import.
step build 60 bash -c "$python setup.py -q build_ext --inplace && $python -c 'import dpfast._native'"
tests=($python -m pytest -q -rs -m "not slow" -p no:cacheprovider)
has xdist && tests+=(-n 6)
step ops_tests 140 "${tests[@]}" tests/ops
ops=($python -m benchmarks.run ops --device cuda --rounds 9 --record "$out")
if [ $failed -eq 0 ]; then ops+=(--tested); fi
step ops 50 "${ops[@]}"
if has diffusers; then
  step gpu_tests 90 "${tests[@]}" tests/gpu
  rows="the predecessor|batched|dpfast, eager|dpfast, CUDA graphs|blocks"
  step models 150 $python -m benchmarks.run models --rows "$rows" --rounds 2 --record "$out"
  step learner 60 $python -m benchmarks.run learner --rows "fused AdamW|dpfast" --rounds 5 --record "$out"
  step run 45 $python -m dpfast run fashion --device cuda --sources dp --out "$out/gpu_run" --overwrite
else
  echo "== sampler, loader and loop skipped: diffusers is not installed"
fi
exit $failed
