#!/usr/bin/env bash
# Tests and times the CUDA kernels on a machine with a GPU, for at most about five minutes, then training, for at most four more (what there is no time for is
# reported as not run): environment, two ceilings, smoke tests, every kernel test on the device,
# attention beside PyTorch's, the other kernels as a share of the copy ceiling. Writes JSON and Markdown to docs/gpu-results/ (--out: elsewhere).
# Installs nothing: it runs with the Python of the machine (PYTHON, else python3), which needs NumPy, ml_dtypes and CuPy 14 with NVRTC; ranks that share the
# GPU are processes where there are mpi4py and mpirun too, else threads. `--help` says more.
# Exit status: 0 all is well, 1 a test failed or was not run, 2 there is no GPU here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

# minillm.kernels lies in kernels/, which only an installed package would know: links stand in for that, before what is in the current folder.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/minillm"
ln -s "$root"/minillm/* "$tree/minillm/"
ln -s "$root/kernels" "$tree/minillm/kernels"
ln -s "$root/launch" "$tree/minillm/launch"
export PYTHONSAFEPATH=1
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m minillm.kernels.gpu_check --root "$root" "$@"
