#!/bin/sh
# ./run.sh [options]     sets up .venv if needed and starts the server (--help lists the options)
# ./run.sh test [args]   the same set-up and pytest, then all tests; args go to pytest
# ./run.sh test --windows [args]   instead the Windows bundle, built and run under wine (needs root; docs/windows.md)
set -eu

self=$0
while [ -L "$self" ]; do # through symbolic links to the project's folder
    link=$(readlink "$self")
    case $link in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
root=$(CDPATH='' cd "$(dirname "$self")" && pwd)

python=
for name in "$root/.venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
        python=$name
        break
    fi
done
if [ -z "$python" ]; then
    echo "没有找到 Python 3.10 到 3.14：请先安装（例如 sudo apt install python3 python3-venv）。" >&2
    echo "No Python from 3.10 to 3.14 was found: install one (e.g. sudo apt install python3 python3-venv)." >&2
    exit 1
fi

if [ "${1-}" = test ]; then
    shift
    "$python" "$root/system/install.py" --with-tests
    cd "$root"
    if [ $# = 0 ]; then set -- -n 2 --dist loadfile; fi # two at a time: half of the time the tests wait
    if [ "$1" = --windows ]; then shift && set -- tests/windows "$@"; fi
    exec "$root/.venv/bin/python" -m pytest "$@"
fi
"$python" "$root/system/install.py" -- "$@"
# with options like --help nothing was installed, and the Python found above will do
if "$root/.venv/bin/python" -c '' 2>/dev/null; then python=$root/.venv/bin/python; fi
# the caller's folder stays the current one: paths among the options start there
export PYTHONPATH="$root" PYTHONSAFEPATH=1 CHATGLM_COMMAND="$0"
exec "$python" -m server "$@"
