#!/bin/sh
# What on_cuda.sh and on_ascend.sh share: runs the report for the device family that is named.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import torch, stevedore, numba' 2>/dev/null; then
  echo "missing: $PYTHON has not all of torch, stevedore and numba: pip install -e '.[demo]', or set PYTHON" >&2
  exit 1
fi
export PYTHONPATH="$PWD:$PWD/backends${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m ci.on_device "$@"
