#!/usr/bin/env bash
# Trains on this machine, from a fresh clone: launch/local.sh [any arguments of xmodal.main].
# EXTRA=cuda or EXTRA=tpu installs JAX for that accelerator.
# Paths, and the runs/ that it writes, are relative to the folder it is called from.
. "$(dirname -- "$0")/environment.sh" "${EXTRA:-}"
case " $* " in
  *" --config "*|*" --config="*) ;;
  *) set -- --config "$repository/configs/vqa.py" "$@" ;;
esac
# -P: whatever lies in the caller's folder, a clone called xmodal included, is not imported.
PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" exec "$venv/bin/python" -P -m xmodal.main "$@"
