#!/usr/bin/env bash
# Runs the tests on this machine, from a fresh clone: launch/test.sh [any arguments of pytest].
arguments=("$@")
. "$(dirname "$0")/environment.sh" test
# A file stays on one worker, so that its tests share what was compiled.
exec .venv/bin/python -m pytest -q -n auto --dist loadfile "${arguments[@]}"
