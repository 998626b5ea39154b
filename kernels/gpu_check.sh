#!/usr/bin/env bash
# Tests and times the CUDA kernels on a machine with a GPU: at most nine minutes for the kernels, and
# nine for training. What does not fit into the time is reported as not run. Where a command may take
# ten minutes, make two calls:
#
#     kernels/gpu_check.sh --only ceilings,smoke,tests,attention,steps --out DIR
#     kernels/gpu_check.sh --only training --out DIR
#
# Sections: environment, two ceilings, smoke tests, every kernel test on the device, attention
# beside PyTorch's, the other kernels as a share of the copy ceiling, compute-sanitizer, training.
# Writes JSON and Markdown to docs/gpu-results/ (--out: elsewhere), after each section. `--help` lists
# the options. MINILLM_COMMIT names the commit where the files come without their .git folder.
#
# Installs nothing. Runs with the Python of the machine (PYTHON, else python3), which needs NumPy,
# ml_dtypes and CuPy 14 with NVRTC. Ranks that share the GPU are processes if mpi4py and mpirun are
# installed, else threads.
#
# Exit status: 0 no problem, 1 a test failed or was not run, 2 no GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

# Only an installed package maps minillm.kernels to kernels/ and minillm.launch to launch/. Here a
# folder of links does. PYTHONSAFEPATH keeps the current folder off the path: its minillm/ would
# hide that one.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/minillm"
ln -s "$root"/minillm/* "$tree/minillm/"
ln -s "$root/kernels" "$tree/minillm/kernels"
ln -s "$root/launch" "$tree/minillm/launch"
export PYTHONSAFEPATH=1
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m minillm.kernels.gpu_check --root "$root" "$@"
