#!/usr/bin/env bash
# Trains on this machine, from a fresh clone: launch/local.sh [any arguments of xmodal train].
# EXTRA=cuda or EXTRA=tpu installs JAX for that accelerator.
# Paths, and the runs/ that it writes, are relative to the folder it is called from.
#
# launch/local.sh --processes N [arguments] starts N processes of one run, which share the GPUs equally.
# The terminal shows process 0; the last lines of another one only if it failed. SIGTERM and Ctrl-C go
# to all. If one fails, the others get GRACE seconds (60) to end by themselves, as long again after
# SIGTERM, then SIGKILL. Ends with the code of the first that failed; 75 if process 0 says so.
. "$(dirname -- "$0")/environment.sh" "${EXTRA:-}"

processes=''
case "${1:-}" in
  --processes) processes="${2:-}"; shift $(($# > 1 ? 2 : 1)) ;;
  --processes=*) processes="${1#*=}"; shift ;;
  *) processes=1 ;;
esac
case "$processes" in
  *[!0-9]*|''|0*)
    echo "error: --processes $processes: wanted a whole number from 1" >&2
    exit 2 ;;
esac
case " $* " in
  *" --config "*|*" --config="*) ;;
  *) set -- --config "$repository/configs/vqa.py" "$@" ;;
esac
# -P: whatever lies in the caller's folder, a clone called xmodal included, is not imported.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
if [ "$processes" = 1 ]; then
  exec "$venv/bin/python" -P -m xmodal.main "$@"
fi

gpus=()
if [ "${JAX_PLATFORMS:-}" = cpu ]; then
  :
elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -r -a gpus <<< "$CUDA_VISIBLE_DEVICES" || true
elif command -v nvidia-smi >/dev/null; then
  while read -r index; do
    gpus+=("$index")
  done < <(nvidia-smi --query-gpu=index --format=csv,noheader | grep -x '[0-9]*')
fi
if [ $((${#gpus[@]} % processes)) != 0 ]; then
  echo "error: ${#gpus[@]} GPUs do not divide among $processes processes; name some: CUDA_VISIBLE_DEVICES=0,1" >&2
  exit 2
fi
share=$((${#gpus[@]} / processes))
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
logs="$(mktemp -d)"
pids=()
codes=()
trap 'rm -rf "$logs"' EXIT

# Sends a signal to the processes that run.
tell() {
  local number
  for number in "${!pids[@]}"; do
    [ -n "${codes[number]}" ] || kill -s "$1" "${pids[number]}" 2>/dev/null || true
  done
}
trap 'tell TERM' TERM
trap 'tell INT' INT

# Each in a process group of its own: Ctrl-C would reach it twice, and the second ends it without
# saving. Without -m, processes in the background ignore SIGINT.
set -m
for ((number = 0; number < processes; number++)); do
  (
    if [ "$share" != 0 ]; then
      CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${gpus[*]:number * share:share}")"
      export CUDA_VISIBLE_DEVICES
    fi
    [ "$number" = 0 ] || exec >"$logs/$number" 2>&1
    exec "$venv/bin/python" -P -m xmodal.main "$@" --coordinator="localhost:$port" \
      --num_processes="$processes" --process_id="$number" </dev/null
  ) &
  pids+=("$!")
  codes+=('')
done
set +m

grace="${GRACE:-60}"
failed=''  # code of the first that failed; 75 is none: all end with it, once they have saved
stage=0    # 1: SIGTERM was sent because of it; 2: SIGKILL
running="$processes"
while [ "$running" != 0 ]; do
  sleep 0.2 || true  # a signal to the whole group ends it
  for number in "${!pids[@]}"; do
    if [ -z "${codes[number]}" ] && ! kill -0 "${pids[number]}" 2>/dev/null; then
      code=0
      wait "${pids[number]}" 2>/dev/null || code=$?
      codes[number]="$code"
      running=$((running - 1))
      if [ "$code" != 0 ] && [ "$code" != 75 ] && [ -z "$failed" ]; then
        failed="$code"
        SECONDS=0
      fi
    fi
  done
  if [ -n "$failed" ] && [ "$SECONDS" -ge $(((stage + 1) * grace)) ]; then
    if [ "$stage" = 0 ]; then tell TERM; else tell KILL; fi
    stage=$((stage + 1))
  fi
done 2>/dev/null  # bash would print the source of a process that was killed

for ((number = 1; number < processes; number++)); do
  code="${codes[number]}"
  if [ "$code" != 0 ] && [ "$code" != 75 ]; then
    echo "process $number ended with $code; its last lines:"
    tail -n 30 "$logs/$number" | sed "s/^/[$number] /"
  fi
done >&2
if [ "$stage" = 0 ] && [ "${codes[0]}" = 75 ]; then  # it noticed that another was killed
  exit 75
fi
exit "${failed:-${codes[0]}}"
