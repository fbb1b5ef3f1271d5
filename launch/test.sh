#!/usr/bin/env bash
# Runs the tests on this machine, from a fresh clone: launch/test.sh [any arguments of pytest].
arguments=("$@")
. "$(dirname "$0")/environment.sh" test
exec .venv/bin/python -m pytest "${arguments[@]}"
