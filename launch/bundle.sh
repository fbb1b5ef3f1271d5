#!/usr/bin/env bash
# Answers with a bundle of xmodal export where nothing but its own requirements is installed:
#   launch/bundle.sh BUNDLE --image FILE --text TEXT [further arguments of BUNDLE/model.py]
# Makes an environment in a temporary folder, installs BUNDLE/requirements.txt there, runs model.py,
# and removes the environment. PYTHON names another interpreter than python3.
set -euo pipefail
bundle="${1:-}"
if [ ! -f "$bundle/requirements.txt" ]; then
  echo "error: '$bundle' is no bundle: it has no requirements.txt; wanted $0 BUNDLE --image FILE --text TEXT" >&2
  exit 2
fi
shift
unset PYTHONPATH
export PYTHONNOUSERSITE=1
venv="$(mktemp -d)"
trap 'rm -rf "$venv"' EXIT
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$bundle/requirements.txt"
"$venv/bin/python" -m pip list --format=freeze --disable-pip-version-check >&2
"$venv/bin/python" "$bundle/model.py" "$@"
