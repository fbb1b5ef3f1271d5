# Sourced by the scripts beside it: makes .venv in the repository and installs what is asked for.
# Usage: . launch/environment.sh [EXTRA]   (PYTHON names another interpreter than python3, VENV
# another folder than .venv, absolute)
# Sets $repository and $venv, absolute, and stays in the caller's folder, so that relative paths
# among the arguments mean what they say.
set -euo pipefail
repository="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$repository/.venv}"

extra="${1:-}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) found, Python 3.11 or newer is wanted; name one: PYTHON=python3.12 $0" >&2
  exit 2
}

# An environment that has pip, by that name too: without `pip` in it, an activated environment finds
# the system's. Debian and Ubuntu keep the pip of venv in a package of its own, and
# without it venv fails half way: so venv makes none, and pip comes from ensurepip or the system's.
make_environment() {
  "$venv/bin/python" -c '' 2>/dev/null ||
    "$python" -m venv --clear --without-pip "$venv" || return
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$venv/bin/python" -m ensurepip --default-pip >/dev/null 2>&1 ||
    "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check pip
}

# Installed once for each state of setup.py.
stamp="$venv/installed${extra:+-$extra}"
if ! cmp -s "$repository/setup.py" "$stamp"; then
  echo "installing into $venv (a few minutes, once)"
  fault="$(make_environment 2>&1)" || {
    echo "error: $venv cannot be made (${fault##*$'\n'}); install python3-venv (Debian, Ubuntu) or name a Python that has pip: PYTHON=python3.12 $0" >&2
    exit 2
  }
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -e "$repository${extra:+[$extra]}" && cp "$repository/setup.py" "$stamp"
fi
