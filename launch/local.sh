#!/usr/bin/env bash
# Trains on this machine, from a fresh clone: launch/local.sh [any arguments of xmodal.main].
# EXTRA=cuda or EXTRA=tpu installs JAX for that accelerator.
arguments=("$@")
set --
. "$(dirname "$0")/environment.sh" "${EXTRA:-}"
case " ${arguments[*]:-} " in
  *" --config "*|*" --config="*) ;;
  *) arguments=(--config configs/vqa.py "${arguments[@]}") ;;
esac
exec .venv/bin/python -m xmodal.main "${arguments[@]}"
