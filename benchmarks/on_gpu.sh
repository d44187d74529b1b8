#!/usr/bin/env bash
# What a GPU has to say, in one call:  benchmarks/on_gpu.sh [--only rows|tests|ops|models|run|experiments] [--tiny] [--list] [FOLDER]
#
#   tests   the operations' tests and the GPU's
#   ops     the operations beside eager PyTorch and torch.compile
#   models  samplers of published size beside (a) and (b), and the learner's step
#   run     the embedded recipe
#   rows    R1 Stable Diffusion and R2 DiT, fused, beside (b) and (b2); R3 their images; R4 the learner's step
#   experiments  what waits for a GPU to let it into the package, or to have it deleted
#
# Without --only all but the rows and the experiments, in less than nine minutes; each step has its own limit, and --list
# prints them with their commands instead. With --tiny the rows, models and run are of sizes that a CPU computes in a minute
# or two, the experiments are compared in Triton's interpreter, and none needs a GPU: to try this script out.
#
# Needs torch, Triton, numpy, pytest and, for the native kernels, pybind11 and a C++ compiler; pytest-xdist makes the tests
# faster. What needs diffusers skips with its reason. Records and logs go to FOLDER, by default benchmarks/results, each as
# soon as it is there, and each row of a table to the terminal. A step that fails, the build too, or meets its limit lets
# the others run and makes the exit status 1.
set -uo pipefail
cd "$(dirname "$0")/.."
usage="usage: benchmarks/on_gpu.sh [--only rows|tests|ops|models|run|experiments] [--tiny] [--list] [FOLDER]"
only="" list="" folder="" tiny=()
while [ $# -gt 0 ]; do
  case $1 in
    --only)
      case ${2:-} in
        rows | tests | ops | models | run | experiments) only=$2 ;;
        *)
          echo "on_gpu.sh: only = '${2:-}': expected rows, tests, ops, models, run or experiments" >&2
          exit 2
          ;;
      esac
      shift
      ;;
    --tiny) tiny=(--tiny) ;;
    --list) list=1 ;;
    -h | --help)
      echo "$usage"
      exit 0
      ;;
    -*)
      echo "on_gpu.sh: $1: no such option; $usage" >&2
      exit 2
      ;;
    *)
      if [ -n "$folder" ]; then
        echo "on_gpu.sh: folder = '$1': expected one, and '$folder' was given; $usage" >&2
        exit 2
      fi
      folder=$1
      ;;
  esac
  shift
done
out=$(realpath -m "${folder:-benchmarks/results}")
export PYTHONPATH=$PWD
export PYTHONUNBUFFERED=1  # what is printed is there, whatever ends the process
python=${PYTHON:-python3}
bench=($python -m benchmarks.run)
failed=0

if [ -z "$list" ]; then
  mkdir -p "$out"
  $python - "${tiny[@]}" <<'EOF' || exit 1
import sys
try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"on_gpu.sh: {sys.executable} has no torch; PYTHON=... names another")
if torch.cuda.is_available():
    print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
elif "--tiny" not in sys.argv:
    sys.exit("on_gpu.sh: torch sees no GPU")
EOF
fi

# name, seconds, command: what it prints goes to the terminal and a log, and the run goes on after a failure. At its limit
# it is interrupted, as by Ctrl-C, so that pytest tells what has failed until then; what does not end is killed.
step() {
  local name=$1 limit=$2
  shift 2
  [ ${#tiny[@]} -gt 0 ] && limit=$((4 * limit))  # of a CPU beside other work
  if [ -n "$list" ]; then
    echo "$name: $limit s: $*"
    return
  fi
  echo "== $name (at most $limit s): $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2> "$out/gpu_$name.err" | tee "$out/gpu_$name.log"
  local code=$?
  if [ $code -ne 0 ]; then
    tail -n 25 "$out/gpu_$name.err"
    echo "== $name failed with $code"
    failed=1
  fi
}

has() { [ -n "$list" ] || $python -c "import sys; from importlib.util import find_spec; sys.exit(not find_spec('$1'))"; }
wanted() { [ "${only:-$1}" = "$1" ]; }

# Compiled beside the first steps, so that no timed step waits for a hundred compilations one after the other.
if [ -z "$list" ] && [ ${#tiny[@]} -eq 0 ] && { [ "$only" = rows ] || wanted models; } && has diffusers; then
  timeout --kill-after=10 120 "${bench[@]}" kernels > "$out/gpu_kernels.log" 2>&1 &
fi

# The build itself never fails, so that dpfast installs without a compiler: whether it worked shows in the import.
if wanted tests || wanted ops; then
  step build 40 bash -c "$python setup.py -q build_ext --inplace && $python -c 'import dpfast._native'"
fi
tests=($python -m pytest -q -rs --tb=short -m "not slow" -p no:cacheprovider)
has xdist && tests+=(-n 8)
if wanted tests; then
  # what the compiler makes of the kernels needs no GPU
  step ops_tests 105 "${tests[@]}" tests/ops --ignore tests/ops/test_audit.py
  has diffusers && step gpu_tests 80 "${tests[@]}" tests/gpu
fi
if wanted ops; then
  limit=240 tested=()  # each operation's tests run before it is timed, unless they have just passed
  if wanted tests; then
    limit=90
    [ $failed -eq 0 ] && tested=(--tested)
  fi
  step ops $limit "${bench[@]}" ops --device cuda --rounds 9 "${tested[@]}" --record "$out"
fi
if [ "$only" = experiments ]; then
  compared=()
  [ ${#tiny[@]} -gt 0 ] && compared=(--interpret)
  step experiments 120 "${bench[@]}" experiments "${compared[@]}" --record "$out"
fi
if [ "$only" = tests ] || [ "$only" = ops ] || [ "$only" = experiments ]; then exit $failed; fi
if ! has diffusers; then
  echo "== samplers, learners and the loop skipped: diffusers is not installed"
  exit $failed
fi
learner=("${bench[@]}" learner "${tiny[@]}" --record "$out")
eager="=plain loop, fused AdamW|AveragedModel|=dpfast"
if wanted models; then
  rows="=(b) batched, eager|=dpfast, fused, CUDA graphs" limit=110
  # at least eight images one by one, twice: a minute and a half of two models
  [ "$only" = models ] && rows="the predecessor|$rows" limit=200
  blocks="=dpfast, unfused, compiled blocks and graphs"
  models=("${bench[@]}" models "${tiny[@]}" --rounds 2 --record "$out")
  step models $limit "${models[@]}" --rows "$rows"
  step dit_blocks 40 "${models[@]}" --models dit-xl-2 --rows "$blocks"
  # Sixteen compilations of half a minute in all, and no time for them beside everything else.
  [ "$only" = models ] && step unet_blocks 120 "${models[@]}" --models stable-diffusion-1.5 --rows "$blocks"
  step learner 30 "${learner[@]}" --rounds 1 --steps 5 --rows "$eager"
fi
if wanted run; then
  short=(--device cuda)
  [ ${#tiny[@]} -gt 0 ] && short=(--iterations 50 --initial-samples 16 --round-samples 16 --maximum-samples 32)
  step run 40 $python -m dpfast run fashion --sources dp "${short[@]}" --out "$out/gpu_run" --overwrite
fi
if [ "$only" = rows ]; then
  models=("${bench[@]}" models "${tiny[@]}" --rounds 2 --record "$out")
  step R1 145 "${models[@]}" --models stable-diffusion-1.5 --rows "batched|dpfast, fused, eager|dpfast, fused, CUDA graphs"
  step R2 85 "${models[@]}" --models dit-xl-2 --rows "=(b) batched, eager|blocks|=dpfast, fused, CUDA graphs|learner|float8"
  step R3 45 "${bench[@]}" images "${tiny[@]}" --record "$out"
  step R4_vit 25 "${learner[@]}" --only ViT --rounds 1 --steps 5 --rows "$eager"
  # apart: where the compilation meets the limit, the record of the others is there
  step R4_compiled 40 "${learner[@]}" --only ViT --rounds 1 --steps 5 --rows "=dpfast, compiled"
  step R4_fashion 15 "${learner[@]}" --only fashion --rounds 5 --rows "$eager|captured"
fi
exit $failed
