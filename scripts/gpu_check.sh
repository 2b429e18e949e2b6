#!/usr/bin/env bash
# Builds, tests, sanitizes and measures this tree on a machine with an NVIDIA GPU; ends in under 9 minutes, needs no network.
#
#   scripts/gpu_check.sh [FOLDER]      results go to FOLDER, by default build/gpu_check
#
# Leaves in FOLDER: summary.json, log.txt, tests.xml, sanitizers.txt, overhead-cuda.json, and of each benchmark (logprobs,
# logits, hidden) NAME-cuda.json and NAME-cuda.png. STAGES="tests benchmarks sanitizers", the default, or some of them, says
# what to run after the build.
# A stage is passed, failed, timed out or unavailable: what could not be run is never called passed. Exit status: 1 if a
# stage failed or timed out, else 0.
#
# Needs: python3 (or $PYTHON) with torch (CUDA), scikit-build-core, pybind11, pytest, hypothesis and numpy; nvcc, cmake,
# ninja; for the picture matplotlib. Wheels in a folder .whl/ of this tree are used where it exists. Nothing is
# installed into the machine's Python: the build goes to a folder of its own.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build/gpu_check}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 1
cd "$root" || exit 1

DEADLINE=515 # seconds after which nothing more is started and what runs is ended
SANITIZED=${SANITIZED:-cuda and reaches_every_kernel} # what the sanitizers can afford, in markers of pyproject.toml
STAGES=${STAGES:-tests benchmarks sanitizers}
PYTHON=${PYTHON:-python3}
for group in $STAGES; do
  case $group in tests | benchmarks | sanitizers) ;; *)
    printf 'STAGES: expected some of tests, benchmarks, sanitizers, got %s\n' "$group" >&2
    exit 2
    ;;
  esac
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$folder"/{summary.json,log.txt,tests.xml,sanitizers.txt,overhead-cuda.json,{logprobs,logits,hidden}-cuda.{json,png}}
export PATH="$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$work/site:$work/wheels" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HYPOTHESIS_PROFILE=ci PIP_DISABLE_PIP_VERSION_CHECK=1 COLUMNS=120
names=() states=() times=() notes=()
declare -A running started budgets # of the stages under way

# ---- Stages ----

say() { printf '%s\n' "$*" | tee -a "$folder/log.txt"; }

record() { # NAME STATE SECONDS NOTE
  names+=("$1") states+=("$2") times+=("$3") notes+=("$4")
  say "--- $1: $2${4:+ ($4)}"
}

# Runs a command with a time budget; JUDGE (its exit status, its output) sets state and note.
stage() { # NAME SECONDS JUDGE COMMAND...
  local name=$1 budget=$2 judge=$3
  shift 3
  start "$name" "$budget" "$@"
  finish "$name" "$judge"
}

# The two halves of a stage: between them others can run beside it.
start() { # NAME SECONDS COMMAND...
  local name=$1 budget=$2 left=$((DEADLINE - SECONDS))
  shift 2
  ((left < 10)) && return
  ((budget > left)) && budget=$left
  say "=== $name, at most $budget s"
  timeout --kill-after=5 "$budget" "$@" > "$work/$name.txt" 2>&1 < /dev/null &
  running[$name]=$! started[$name]=$SECONDS budgets[$name]=$budget
}

finish() { # NAME JUDGE
  local name=$1 judge=$2 output="$work/$1.txt" status
  if [[ -z ${running[$name]-} ]]; then
    record "$name" "timed out" 0 "no time was left to start it"
    return
  fi
  wait "${running[$name]}"
  status=$?
  tail -c 1500000 "$output" >> "$folder/log.txt"
  tail -n 12 "$output"
  state=failed note="exit status $status"
  if ((status == 124 || status == 137)); then
    state="timed out" note="after ${budgets[$name]} s"
  else
    "$judge" "$status" "$output"
  fi
  record "$name" "$state" $((SECONDS - started[$name])) "$note"
}

state_of() {
  local index
  for index in "${!names[@]}"; do
    [[ ${names[index]} == "$1" ]] && printf '%s' "${states[index]}"
  done
}

skip() { # REASON NAME...
  local reason=$1 name
  shift
  for name in "$@"; do record "$name" unavailable 0 "$reason"; done
}

# ---- Judges ----

judge_status() { (($1 == 0)) && state=passed note=""; }

judge_build() {
  (($1 == 0)) || return
  note=$("$PYTHON" - "$work/site" 2>&1 <<'END'
import pathlib, sys
import ipo_ext
from ipo_ext import _C
found = pathlib.Path(ipo_ext.__file__).resolve()
if pathlib.Path(sys.argv[1]).resolve() not in found.parents:
    sys.exit(f"another ipo_ext is in the way: {found}; uninstall it first")
if not _C.CUDA_ARCHITECTURES:
    sys.exit("the build has no CUDA operators")
print(f"nvcc {_C.CUDA_COMPILER}, architectures {' '.join(_C.CUDA_ARCHITECTURES)}")
END
  ) && state=passed
  note=${note##*$'\n'}
}

judge_tests() { # passed only if tests ran: all of those selected are marked with the backend cuda
  local passed
  [[ -f $folder/tests.xml ]] || return
  read -r passed note < <("$PYTHON" - "$folder/tests.xml" <<'END'
import sys
import xml.etree.ElementTree as tree
root = tree.parse(sys.argv[1]).getroot()
tests, failures, errors, skipped = (
    sum(int(suite.get(key, 0)) for suite in root.iter("testsuite"))
    for key in ("tests", "failures", "errors", "skipped")
)
passed = tests - failures - errors - skipped
print(passed, f"{passed} passed on the GPU, {failures + errors} failed, {skipped} skipped")
END
  )
  (($1 == 0 && passed > 0)) && state=passed
}

# A clean sanitizer says so itself, and pytest has passed tests under it.
judge_sanitizer() {
  local output=$2 refusal
  {
    printf '=== %s\n' "$name"
    grep -E '^=========|passed|failed|rror' "$output" | tail -c 400000
  } >> "$folder/sanitizers.txt"
  refusal=$(grep -m 1 -iE 'device not supported|not supported on this|no attachable process|unable to (find|load)|internal sanitizer error|insufficient permission' "$output")
  if [[ -n $refusal ]]; then
    state=unavailable note="${refusal#========= }"
  elif grep -qE 'SUMMARY: [1-9][0-9]* (error|hazard)' "$output"; then
    note=$(grep -m 1 -oE '[A-Z]+ SUMMARY: .*' "$output")
  elif ! grep -qE '(ERROR|RACECHECK) SUMMARY: 0 ' "$output"; then
    if grep -qE '[0-9]+ passed' "$output"; then state=unavailable note="it printed no summary"; fi
  elif (($1 == 0)) && grep -qE '[0-9]+ passed' "$output"; then
    state=passed note="0 errors, $(grep -oE '[0-9]+ passed' "$output" | tail -n 1)"
  fi
}

# ---- What is there ----

modules_missing() {
  local module
  for module in "$@"; do
    "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" 2> /dev/null ||
      printf '%s ' "$module"
  done
}

programs_missing() {
  local program
  for program in "$@"; do command -v "$program" > /dev/null || printf '%s ' "$program"; done
}

# "NAME, capability C, driver D, torch T", nothing without a GPU that torch can use.
find_gpu() {
  "$PYTHON" - 2> /dev/null <<'END'
import subprocess
import torch
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    print(device.major * 10 + device.minor)
    print(f"{device.name}, driver {driver[0] if driver else 'unknown'}, torch {torch.__version__}")
END
}

# ---- The stages ----

measured=(tests logprobs logits hidden overhead memcheck racecheck synccheck initcheck)

build() {
  local missing
  missing="$(modules_missing torch scikit_build_core pybind11)$(programs_missing nvcc cmake ninja)"
  if [[ -n $missing ]]; then
    skip "missing: $missing" build
    return
  fi
  stage build 170 judge_build env -u TORCH_CUDA_ARCH_LIST IPO_EXT_CUDA=ON CUDAARCHS="$capability-real" \
    "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index \
    --config-settings=build-dir="$work/build" --target "$work/site" .
}

run_tests() {
  local missing parallel=()
  missing=$(modules_missing pytest hypothesis numpy)
  if [[ -n $missing ]]; then
    skip "missing: $missing" tests
    return
  fi
  # Most of a test's time is a CPU's; 12 processes at most, each of which holds a CUDA context.
  [[ -z $(modules_missing xdist) ]] && parallel=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  stage tests 180 judge_tests "$PYTHON" -m pytest tests -m cuda -q -p no:cacheprovider "${parallel[@]}" \
    --junitxml="$folder/tests.xml"
}

benchmark() { # NAME SECONDS OPTION...
  local name=$1 budget=$2 picture=(--picture "$folder/$1-cuda.png")
  shift 2
  [[ -n $(modules_missing matplotlib) ]] && picture=()
  stage "$name" "$budget" judge_status "$PYTHON" -m "benchmarks.$name" --device cuda --json "$folder/$name-cuda.json" \
    "${picture[@]}" "$@"
}

run_benchmarks() {
  [[ -n $(modules_missing matplotlib) ]] && say "no matplotlib: no pictures"
  benchmark logits 100 --deadline 75
  benchmark hidden 70 --tokens 8192 --active 100,50 --rounds 3
  benchmark logprobs 80 --seconds 1 --deadline 60
  stage overhead 25 judge_status "$PYTHON" -m benchmarks.logprobs.overhead --device cuda --turns 60 \
    --json "$folder/overhead-cuda.json"
}

run_sanitizers() {
  local tools=(memcheck racecheck synccheck initcheck) missing tool
  missing="$(programs_missing compute-sanitizer)$(modules_missing pytest hypothesis numpy)"
  if [[ -n $missing ]]; then
    skip "missing: $missing" "${tools[@]}"
    return
  fi
  # Side by side: most of their time is a CPU's.
  for tool in "${tools[@]}"; do
    # Without torch's cache every tensor is an allocation of its own, whose ends are then checked.
    start "$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 86 \
      "$PYTHON" -m pytest tests -m "$SANITIZED" -q -p no:cacheprovider
  done
  for tool in "${tools[@]}"; do finish "$tool" judge_sanitizer; done
}

# ---- Summary ----

plain() { tr -d '"\\' <<< "$1" | tr '\n\t' '  ' | tr -cd '[:print:]' | sed 's/ *$//'; }

summarise() {
  local index separator=""
  {
    printf '{\n "date": "%s",\n "commit": "%s",\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(plain "$commit")"
    printf ' "gpu": "%s",\n "seconds": %d,\n "stages": [' "$(plain "$gpu")" "$SECONDS"
    for index in "${!names[@]}"; do
      printf '%s\n  {"name": "%s", "state": "%s", "seconds": %d, "note": "%s"}' "$separator" \
        "${names[index]}" "${states[index]}" "${times[index]}" "$(plain "${notes[index]}")"
      separator=,
    done
    printf '\n ]\n}\n'
  } > "$folder/summary.json"
  say ""
  say "$(printf '%-11s %-12s %7s  %s' stage state seconds note)"
  for index in "${!names[@]}"; do
    say "$(printf '%-11s %-12s %7d  %s' "${names[index]}" "${states[index]}" "${times[index]}" "${notes[index]}")"
  done
  say "GPU: ${gpu:-none}. $SECONDS s. Results in $folder"
}

head=$(git rev-parse HEAD 2> /dev/null)
commit=${head:-${IPO_EXT_COMMIT:-unknown}}
if compgen -G ".whl/*.whl" > /dev/null; then
  stage wheels 40 judge_status "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --target "$work/wheels" .whl/*.whl
fi
gpu="" capability=""
{
  read -r capability
  read -r gpu
} < <(find_gpu)
if [[ -z $gpu ]]; then
  skip "no GPU that torch can use" build "${measured[@]}"
else
  say "$gpu"
  build
  if [[ $(state_of build) == passed ]]; then
    for group in $STAGES; do "run_$group"; done
  else
    skip "there is no build to check" "${measured[@]}"
  fi
fi
summarise
for state in "${states[@]}"; do
  [[ $state == failed || $state == "timed out" ]] && exit 1
done
exit 0
