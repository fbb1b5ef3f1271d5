#!/usr/bin/env bash
# Runs the tests on this machine, from a fresh clone: launch/test.sh [any arguments of pytest].
# Paths are relative to the repository, such as tests/test_t5.py.
. "$(dirname -- "$0")/environment.sh" test
cd -- "$repository"
# A file stays on one worker, so that its tests share what was compiled; files in the order of
# tests/conftest.py, not those of many tests first.
exec "$venv/bin/python" -m pytest -q -n auto --dist loadfile --no-loadscope-reorder "$@"
