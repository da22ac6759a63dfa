#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on a machine with an NVIDIA GPU and a Python that has torch; needs no network and
# changes nothing outside this checkout. `make gpu`, or bench/gpu.sh.
#
#   PARTS="build test sanitize bench"   which, in this order (all)       PYTHON=python3   the one that has torch
#   RESULTS=bench/results               where the numbers go             LIMIT_S=530      seconds for everything
#   ARGS="-k graphs"                    for a single part: of pytest, of tests/gpu/sanitize.py or of ppo_fast.bench.gpu
#   PPO_FAST_COMMIT=<hash>              for the results, where the checkout is a copy without .git
#   PPO_FAST_DLPACK_INCLUDE=<folder>    with dlpack/dlpack.h, where neither torch nor apache-tvm-ffi brings a recent one
#
# Every part runs even if one before it failed. Exit status: 0, 1 where a part failed, 2 where this machine or the call is
# not what it needs to be.
set -u -o pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PARTS=${PARTS:-build test sanitize bench}
LIMIT_S=${LIMIT_S:-530}
ARGS=${ARGS:-}
RESULTS=${RESULTS:-$ROOT/bench/results}
WORK=$ROOT/build/gpu SITE=$ROOT/build/gpu/site

stop() {
  echo "gpu.sh: $1" >&2
  exit 2
}

for name in $PARTS; do
  case $name in
  build | test | sanitize | bench) ;;
  *) stop "PARTS must be of build, test, sanitize and bench; got $name" ;;
  esac
done
[[ -z $ARGS || $PARTS != *" "* ]] || stop "ARGS are for a single part; PARTS are $PARTS"
wanted=${PYTHON:-python3}
PYTHON=$(command -v "$wanted") || stop "no $wanted on PATH; choose another one: PYTHON=..."
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
[[ $RESULTS == /* ]] || RESULTS=$PWD/$RESULTS
cd "$ROOT" || exit 2

# --- the machine ------------------------------------------------------------------------------------------------------

facts=$("$PYTHON" bench/gpu_setup.py facts) || exit 2
while IFS='=' read -r name value; do
  case $name in
  gpu) GPU=$value ;;
  devices) DEVICES=$value ;;
  architecture) ARCHITECTURE=$value ;;
  tag) TAG=$value ;;
  esac
done <<<"$facts"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-$DEVICES} # tests/conftest.py hides GPUs where nobody said which
export PYTHONUNBUFFERED=1 PYTHONPATH=$SITE
export TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor # kept between runs, inside this checkout
unset TRITON_INTERPRET PPO_FAST_BACKEND PPO_FAST_TRY_GPU_TESTS
command -v nvcc >/dev/null || [[ ! -x /usr/local/cuda/bin/nvcc ]] || PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$WORK"
"$PYTHON" bench/gpu_setup.py tree "$SITE" || exit 2
echo "gpu.sh: $GPU; parts: $PARTS; at most $LIMIT_S s; logs: build/gpu/*.log"

# --- the parts, each in at most $LIMIT seconds --------------------------------------------------------------------------

build() {
  local include
  include=$("$PYTHON" bench/gpu_setup.py dlpack "$WORK/include") || return 1
  PPO_FAST_CUDA=1 PPO_FAST_CUDA_ARCHITECTURES=${PPO_FAST_CUDA_ARCHITECTURES:-$ARCHITECTURE} \
    PPO_FAST_DLPACK_INCLUDE=$include PPO_FAST_BUILD_DIR=build/gpu/$TAG \
    timeout -k 15 "$LIMIT" "$PYTHON" setup.py build_ext --inplace || return 1
  "$PYTHON" bench/gpu_setup.py tree "$SITE"
}

# From $SITE, so that the package is found there and not in the checkout, where kernels/ and bench/ lie beside it.
run_tests() {
  local processes=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && processes=(-n "${TEST_JOBS:-6}" --dist loadgroup)
  # shellcheck disable=SC2086
  cd "$SITE" && OMP_NUM_THREADS=2 timeout -k 15 "$LIMIT" "$PYTHON" -m pytest -c "$ROOT/pyproject.toml" \
    --rootdir "$ROOT" -p no:cacheprovider -m gpu -rfE --durations=8 --continue-on-collection-errors \
    "${processes[@]}" "$ROOT/tests/gpu" $ARGS
}

run_sanitizer() {
  # shellcheck disable=SC2086
  cd "$SITE" && timeout -k 15 "$LIMIT" "$PYTHON" "$ROOT/tests/gpu/sanitize.py" --logs "$WORK" \
    --limit $((LIMIT - 10)) $ARGS
}

run_bench() {
  local reserve=45 # for the case that has begun, and for writing
  # shellcheck disable=SC2086
  cd "$SITE" && timeout -k 15 "$LIMIT" "$PYTHON" -m ppo_fast.bench.gpu --out "$RESULTS" \
    --limit $((LIMIT > 2 * reserve ? LIMIT - reserve : reserve)) $ARGS
}

# --- running them -----------------------------------------------------------------------------------------------------

declare -A CODE TOOK
run_part() { # name, seconds at most, function
  local later=0 seen="" name
  for name in $PARTS; do
    [[ -n $seen ]] && later=$((later + 1))
    [[ $name == "$1" ]] && seen=1
  done
  local left=$((LIMIT_S - SECONDS - 60 * later)) began=$SECONDS
  LIMIT=$(($2 < left ? $2 : left))
  TOOK[$1]=0 CODE[$1]=124
  if ((LIMIT < 5)); then
    echo "gpu.sh: no time left for $1" | tee "$WORK/$1.log"
    return
  fi
  echo
  echo "=== $1, at most $LIMIT s"
  "$3" 2>&1 | tee "$WORK/$1.log"
  CODE[$1]=${PIPESTATUS[0]}
  TOOK[$1]=$((SECONDS - began))
  echo "=== $1: $(outcome "$1"), ${TOOK[$1]} s"
}
outcome() {
  case ${CODE[$1]} in
  0) echo passed ;;
  124 | 137) echo "FAILED: out of time" ;;
  *) echo "FAILED" ;;
  esac
}

trap 'exit 130' INT
for name in $PARTS; do
  case $name in
  build) run_part build 240 build ;;
  test) run_part test 240 run_tests ;;
  sanitize) run_part sanitize 180 run_sanitizer ;;
  bench) run_part bench 240 run_bench ;;
  esac
done

# --- one page ---------------------------------------------------------------------------------------------------------

digest() { # the lines of a part's log that say how it went
  local log=$WORK/$1.log
  case $1 in
  build)
    if ((CODE[build])); then
      grep -iE 'error|gpu\.sh:|ppo_fast:' "$log" | tail -n 6
    else
      grep -E '^ppo_fast: built' "$log" | tail -n 2
    fi
    ;;
  test)
    grep -E '^(FAILED|ERROR) ' "$log" | head -n 12
    grep -E ' (passed|failed|skipped|error)' "$log" | tail -n 1
    ;;
  sanitize) grep -E '^(calls|memcheck|racecheck|initcheck|synccheck|planted|sanitize)\b' "$log" | tail -n 7 ;;
  bench)
    grep -E '^- (parity failed|failed|differs)' "$log" | head -n 4
    sed -n '/^## Targets/,$p' "$log" | grep '^|' | head -n 16
    ;;
  esac | cut -c 1-170
}

echo
echo "=== summary: $GPU, $SECONDS s"
failed=0
for name in $PARTS; do
  printf '%-9s %-22s %4d s\n' "$name" "$(outcome "$name")" "${TOOK[$name]}"
  digest "$name" | sed 's/^/    /'
  ((CODE[$name] == 0)) || failed=1
done
exit $failed
