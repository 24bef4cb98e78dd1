#!/bin/sh
# What to run first on a machine with NVIDIA GPUs: prints a report to paste. Takes some minutes.
#   ci/on_cuda.sh > report.md          PYTHON=... chooses the interpreter that has torch and this project
exec "$(dirname "$0")/on_device.sh" cuda "$@"
