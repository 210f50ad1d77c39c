#!/usr/bin/env bash
# Installs what sid-ray needs, at the versions of constraints.txt, into the environment of a Python 3.11:
#
#   install.sh PYTHON
#
# pyproject.toml and constraints.txt lie beside this script (or a folder above). The code itself is not installed: it
# comes with each job. Does nothing where the same versions were installed before.
set -euo pipefail
python=$1
here=$(cd "$(dirname "$0")" && pwd)
test -f "$here/pyproject.toml" || here=$(dirname "$here")
wanted=$("$python" - "$here/pyproject.toml" <<'END'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print("\n".join(project["dependencies"] + project["optional-dependencies"]["cluster"]))
END
)
record="$("$python" -c 'import sys; print(sys.prefix)')/.sid-ray-installed"
if test -f "$record" && { echo "$wanted"; cat "$here/constraints.txt"; } | cmp -s - "$record"; then
    exit 0
fi
# torch first and pinned: any other order lets a dependency choose another build of it.
"$python" -m pip install --no-input -c "$here/constraints.txt" torch numpy
echo "$wanted" | "$python" -m pip install --no-input -c "$here/constraints.txt" -r /dev/stdin
{ echo "$wanted"; cat "$here/constraints.txt"; } > "$record"
