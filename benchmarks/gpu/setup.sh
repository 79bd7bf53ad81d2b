#!/bin/sh
# Install the wheels of `make gpu-wheels` without a network, on the machine that has the GPU:
#     sh benchmarks/gpu/setup.sh [ENVIRONMENT]
# ENVIRONMENT (build/gpu) is a virtual environment on top of the packages of $PYTHON (python3), which are not changed.
# A second call finds everything done, unless the wheels are others.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
env=${1:-$root/build/gpu}
wheels=${WHEELS:-$root/build/wheels}
python=${PYTHON:-python3}

ls "$wheels"/*.whl >/dev/null 2>&1 || { echo "no wheels in $wheels: run 'make gpu-wheels' where there is a network" >&2; exit 2; }
state=$(cd "$wheels" && cksum ./*.whl)
if [ "$(cat "$env/wheels.txt" 2>/dev/null)" != "$state" ]; then
  rm -rf "$env"
  "$python" -m venv --without-pip "$env"
  site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --target "$site" "$wheels"/*.whl
  # After its own packages come those of $PYTHON, also where that is a virtual environment itself; and minipuzzle.
  # A .pth file, not PYTHONPATH: the reload gate starts Python without the latter.
  "$python" -c 'import site, sysconfig
paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
print("".join(f"import site; site.addsitedir({path!r})\n" for path in paths), end="")' > "$site/machine.pth"
  echo "$root" > "$site/minipuzzle.pth"
  echo "$state" > "$env/wheels.txt"
fi
"$env/bin/python" "$root/benchmarks/gpu/wheels.py" --check
echo "$env/bin/python benchmarks/gpu/check.py --out gpu_results"
