#!/usr/bin/env bash
# Trains on all workers of a TPU VM, and starts again until the run has finished:
#   ZONE=ZONE launch/tpu_vm.sh NAME [arguments of xmodal train]
# Calls gcloud from your machine, copies this repository to ~/xmodal of each worker and installs there.
# The workers have no common folder: --workdir has to be in a bucket or on a mounted disk.
# Variables:
#   CREATE        options of `gcloud compute tpus tpu-vm create`: makes the TPU where it is missing, and
#                 again after a preemption:
#                 CREATE='--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot'
#   MAX_RESTARTS  restarts after codes other than 75 while the TPU is there; 10
#   PAUSE         seconds between two tries; 30
# SIGTERM and Ctrl-C end the run on the workers, which save; the next call resumes. Ends with 0 when the
# run has finished, 75 when it was stopped, 2 on an error that you can fix. The TPU remains.
set -u
if [ $# = 0 ] || [ -z "${ZONE:-}" ]; then
  echo "error: wanted ZONE=ZONE $0 NAME [arguments of xmodal train]" >&2
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  echo "error: gcloud is not installed; see cloud.google.com/sdk" >&2
  exit 2
fi
repository="$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"
name="$1"
shift
pause="${PAUSE:-30}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

tpu() {
  gcloud compute tpus tpu-vm "$1" --zone="$ZONE" "${@:2}"
}

workers() {
  tpu ssh "$name" --worker=all --command="$1"
}

state() {
  tpu describe "$name" --format='value(state)' 2>"$folder/fault"
}

say() {
  echo "launch/tpu_vm.sh: $*" >&2
}

# Ends if gcloud's message in $folder/fault is of an error that another try does not mend.
mendable() {
  cat "$folder/fault" >&2
  if grep -Eq 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|does not have permission|gcloud auth|unrecognized arguments|Invalid choice' \
      "$folder/fault"; then
    say "error: gcloud refuses; see above"
    exit 2
  fi
}

# Waits until the TPU is there; makes it if it is missing or was taken away.
ready() {
  local found
  while [ -z "$stopped" ]; do
    found="$(state)"
    case "$found" in
      READY) return ;;
      STOPPED) tpu start "$name" ;;
      PREEMPTED|TERMINATED) say "$name: $found, deleting it"; tpu delete "$name" --quiet ;;
      '')
        if ! grep -q NOT_FOUND "$folder/fault"; then
          mendable  # or no connection
          sleep "$pause"
          continue
        fi
        if [ -z "${CREATE:-}" ]; then
          say "error: no TPU $name in $ZONE; name another, or set CREATE to have it made"
          exit 2
        fi
        say "creating $name"
        # shellcheck disable=SC2086  # several options
        tpu create "$name" $CREATE 2>"$folder/fault"
        case $? in
          0) ;;
          2) cat "$folder/fault" >&2; exit 2 ;;  # options that gcloud does not know
          *) mendable ;;  # or no TPU is free
        esac
        [ "$(state)" != READY ] || return ;;
      *) say "$name: $found" ;;
    esac
    sleep "$pause"
  done
}

# The Python of many TPU images is older than 3.11.
read -r -d '' install <<'END'
set -e
mkdir -p xmodal
tar -xzf xmodal.tgz -C xmodal
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv python install --quiet 3.12
  export PYTHON="$(~/.local/bin/uv python find 3.12)"
}
echo "${PYTHON:-python3}" > xmodal/python
bash -c '. xmodal/launch/environment.sh tpu'
END
# A run whose connection was lost holds the TPU.
read -r -d '' stop <<'END'
pid="$(cat xmodal/pid 2>/dev/null)" && grep -qs xmodal "/proc/$pid/cmdline" || exit 0
kill -TERM "$pid"
for second in $(seq 120); do kill -0 "$pid" 2>/dev/null || exit 0; sleep 1; done
kill -KILL "$pid"
END
run="cd xmodal && echo \$\$ > pid && EXTRA=tpu PYTHON=\$(cat python) exec launch/local.sh --multihost$(
  [ $# = 0 ] || printf ' %q' "$@")"

stopped=''
trap 'stopped=1; say "stopping"; workers "$stop"' TERM INT
failures=0
while ready; [ -z "$stopped" ]; do
  tar -czf "$folder/xmodal.tgz" -C "$repository" --exclude=./.venv --exclude='./.venv-*' --exclude=./.git \
    --exclude=./runs --exclude=./made --exclude=__pycache__ .
  code=1
  if tpu scp "$folder/xmodal.tgz" "$name:" --worker=all && workers "$install" && workers "$stop"; then
    # In the background, so that the trap comes at once; Ctrl-C leaves the connection alone.
    (trap '' INT; workers "$run") &
    while wait $!; code=$?; [ "$code" -gt 128 ] && kill -0 $! 2>/dev/null; do :; done
    say "ended with $code"
    case "$code" in
      0|2) exit "$code" ;;
    esac
  fi
  if [ "$code" != 75 ] && [ -z "$stopped" ] && [ "$(state)" = READY ]; then
    failures=$((failures + 1))
    [ "$failures" -le "${MAX_RESTARTS:-10}" ] || exit "$code"
  fi
  [ -n "$stopped" ] || sleep "$pause"
done
exit 75
