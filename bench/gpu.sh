#!/bin/sh
# Device memory to device memory, on one GPU or between two: see bench/gpu.py. Ends by itself within seven minutes. Needs
# weightwire and nixl for the installed torch (nixl-cu13 for CUDA 13) importable, and about 62 GB of free device memory on
# each (30GB shape: two processes a device; 5,000 buffers).
#
#   bench/gpu.sh                               one device
#   bench/gpu.sh --devices cuda:0 cuda:1       two: NVLink, where it links them
#
# More arguments: bench/gpu.py --help. OUT=folder for gpu.json, gpu.txt and gpu.log.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="${WEIGHTWIRE_SRC:-$PWD/src}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Weights in expandable segments cannot be shared between processes: plain allocations, whatever the default.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:False}"
exec timeout -k 15 "${SECONDS_MAX:-450}" "${PYTHON:-python3}" bench/gpu.py "$@"
