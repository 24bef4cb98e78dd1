#!/bin/sh
# What to run first on a machine with Ascend NPUs (source CANN's set_env.sh before): prints a report to paste. Takes some minutes.
#   ci/on_ascend.sh > report.md          PYTHON=... chooses the interpreter that has torch and this project
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import torch, stevedore, numba' 2>/dev/null; then
  echo "missing: $PYTHON has not all of torch, stevedore and numba: pip install -e '.[demo]', or set PYTHON" >&2
  exit 1
fi
export PYTHONPATH="$PWD:$PWD/backends${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m ci.on_device ascend "$@"
