#!/usr/bin/env bash
# All GPU tests and benchmarks in one call, in under nine minutes:  benchmarks/on_gpu.sh [FOLDER]
#
# Needs torch, Triton, numpy and pytest; builds the native kernels where pybind11 and a compiler are present. What needs
# diffusers or DALI skips with its reason. Records and logs go to FOLDER, by default benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$out"
export PYTHONPATH=$PWD
python=${PYTHON:-python3}

$python - <<'EOF' || exit 1
import sys, torch
if not torch.cuda.is_available():
    sys.exit("on_gpu.sh: torch sees no GPU")
print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
EOF
timeout 60 $python setup.py -q build_ext --inplace 2>&1 | tail -n 3

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

if $python -c "import diffusers" 2> /dev/null; then
  step sampler_tests 150 $python -m pytest tests/generate -q -rs -m "not slow" -p no:cacheprovider
else
  echo "== sampler tests skipped: diffusers is not installed"
fi
step ops_tests 150 $python -m pytest tests/ops -q -rs -m "not slow" -p no:cacheprovider
step ops 180 $python -m benchmarks.run ops --device cuda --record "$out"
exit $failed
