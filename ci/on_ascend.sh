#!/bin/sh
# What to run first on a machine with Ascend NPUs (source CANN's set_env.sh before): prints a report to paste. Takes some minutes.
#   ci/on_ascend.sh > report.md          PYTHON=... chooses the interpreter that has torch and this project
exec "$(dirname "$0")/on_device.sh" ascend "$@"
