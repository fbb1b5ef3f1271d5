#!/usr/bin/env bash
# Runs the tests under each Python that xmodal supports, with the newest JAX and other packages that
# each can have: launch/python_versions.sh [any arguments of pytest].
# Each has an environment of its own in the repository: .venv-3.11 and so on. PYTHONS names other
# interpreters: PYTHONS="python3.12 /opt/python3.13/bin/python3" launch/python_versions.sh
# Ends with 1 if the tests failed under one of them, 2 if there is none of them.
set -u
trap 'exit 130' INT
launch="$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)"

report=()
found=0
failed=0
for python in ${PYTHONS:-python3.11 python3.12 python3.13}; do
  if ! version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"; then
    report+=("$python: not found, not tested")
    continue
  fi
  found=1
  export PYTHON="$python" VENV="${launch%/*}/.venv-$version"
  (
    . "$launch/environment.sh" test
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --upgrade --upgrade-strategy eager -e "${repository}[test]"
    echo "$("$venv/bin/python" --version), $("$venv/bin/python" -m pip list --format=freeze |
      grep -E '^(jax|flax|numpy|transformers)==' | tr '\n' ' ')"
    exec "$launch/test.sh" "$@"
  )
  code=$?
  if [ "$code" = 0 ]; then
    report+=("$python: passed")
  else
    report+=("$python: failed with exit code $code")
    failed=1
  fi
done

printf '%s\n' "${report[@]}"
if [ "$found" = 0 ]; then
  echo "error: none of them found; name some: PYTHONS=\"python3.12 /opt/python3.13/bin/python3\" $0" >&2
  exit 2
fi
exit "$failed"
