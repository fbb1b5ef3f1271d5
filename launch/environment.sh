# Sourced by the scripts beside it: makes .venv in the repository and installs what is asked for.
# Usage: . launch/environment.sh [EXTRA]   (PYTHON names another interpreter than python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) found, Python 3.11 or newer is wanted; name one: PYTHON=python3.12 $0" >&2
  exit 2
}
# Installed once for each state of setup.py.
stamp=".venv/installed${extra:+-$extra}"
if ! cmp -s setup.py "$stamp"; then
  echo "installing into .venv (a few minutes, once)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
  cp setup.py "$stamp"
fi
