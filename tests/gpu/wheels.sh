#!/usr/bin/env bash
# Collects what `longseq bench gpu` needs on a machine without a network that has Python 3.12, PyTorch 2.11 or newer with
# its Triton, NumPy and Lightning, and nothing else of ours: wheels for Linux on x86-64, less than 50 MiB.
#
#   tests/gpu/wheels.sh FOLDER            here, with a network
#
# and on that machine, in a clone of this repository beside FOLDER:
#
#   python3 -m pip install --no-index --find-links FOLDER --requirement FOLDER/requirements.txt
#   PYTHONPATH=platform:pipelines python3 -m longseq.cli bench gpu --out RESULTS
#
# The table is printed, and RESULTS/gpu.json holds every number. Without the wheels the parts that train fail, the others
# run. Nothing there reads Arrow files, so pyarrow (55 MB alone) and pandas are left out; datasets is collected, and
# `pip install --no-index --find-links FOLDER datasets` installs it where these two are. `longseq data prepare` (Dask) and
# `longseq completion` (shtab) do not work there.
# DeepSpeed has no wheels of its own: one is built here, without compiled operators.
set -euo pipefail

[ $# = 1 ] || { echo "usage: tests/gpu/wheels.sh FOLDER" >&2; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3} # 3.11 or newer, with pip
mkdir -p "$1"
folder=$(cd "$1" && pwd)
most=$((50 * 1024 * 1024))

# There already, or left out.
theirs="torch triton lightning pytorch-lightning torchmetrics numpy setuptools pyarrow pandas"
# Verbs and data that the benchmark has nothing to do with, which import them where they need them.
theirs+=" distributed shtab cryptography"

platforms=()
for glibc in 5 12 17 24 27 28; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
for name in manylinux1 manylinux2010 manylinux2014; do platforms+=(--platform "${name}_x86_64"); done
download() {
    "$python" -m pip download --quiet --disable-pip-version-check --dest "$folder" --constraint "$root/constraints.txt" \
        --python-version 3.12 --implementation cp --only-binary=:all: "${platforms[@]}" "$@"
}

# needs FILE: what a wheel or pyproject.toml asks for, a requirement a line, without "theirs".
needs() {
    "$python" - "$1" "$theirs" <<'PYTHON'
import re
import sys
import tomllib
import zipfile
from email import message_from_bytes

path, theirs = sys.argv[1], sys.argv[2].split()
if path.endswith(".toml"):
    with open(path, "rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
else:
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])
for requirement in wanted:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")
    if name not in theirs and not re.search(r";.*\b(extra|sys_platform|platform_system)\b", requirement):
        print(requirement.partition(";")[0].strip())
PYTHON
}

rm -f "$folder"/*.whl
mapfile -t ours < <(needs "$root/pyproject.toml")
deepspeed=$(printf '%s\n' "${ours[@]}" | grep '^deepspeed')
datasets=$(printf '%s\n' "${ours[@]}" | grep '^datasets')
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" \
    --constraint "$root/constraints.txt" "$deepspeed"
download --no-deps "$datasets"
mapfile -t theirs_too < <(for wheel in "$folder"/{deepspeed,datasets}-*.whl; do needs "$wheel"; done)
mapfile -t rest < <(printf '%s\n' "${ours[@]}" | grep -v '^\(deepspeed\|datasets\)')
download "${rest[@]}" "${theirs_too[@]}"
for name in $theirs; do rm -f "$folder/${name//-/_}"-[0-9]*.whl; done
printf '%s\n' "${rest[@]}" "$deepspeed" >"$folder/requirements.txt"

bytes=$(cat "$folder"/*.whl | wc -c)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $((bytes / 1024 / 1024)) MiB in $folder; on the machine without a network:"
echo "python3 -m pip install --no-index --find-links $1 --requirement $1/requirements.txt"
if [ "$bytes" -ge "$most" ]; then
    echo "wheels.sh: $bytes bytes are 50 MiB or more: leave something out" >&2
    exit 1
fi
