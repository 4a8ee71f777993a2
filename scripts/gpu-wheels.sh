#!/usr/bin/env bash
# Fetches the wheels that `python3 -m benchmarks.gpu` needs on a bare GPU machine, which has torch, transformers and
# their like but no registry: scripts/gpu-wheels.sh DIR [PYTHON_VERSION]. Two megabytes; versions from constraints.txt.
# There:  python3 -m pip install --no-index --no-deps --target site DIR/*.whl && export PYTHONPATH=$PWD/site
set -euo pipefail
cd "$(dirname "$0")/.."
into=${1:?usage: scripts/gpu-wheels.sh DIR [PYTHON_VERSION, such as 3.12]}
for name in prompt-toolkit wcwidth xxhash; do
    pinned=$(grep -iE "^${name//-/[-_]}==" constraints.txt) || { echo "constraints.txt does not pin $name" >&2; exit 1; }
    echo "$pinned"
    python3 -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
        --python-version "${2:-3.12}" -d "$into" "$pinned"
done
