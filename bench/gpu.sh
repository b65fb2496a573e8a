#!/bin/sh
# Device memory to device memory on one GPU, in some two minutes: see bench/gpu.py. Needs weightwire and nixl for the
# installed torch (nixl-cu13 for CUDA 13) importable, and about 62 GB of free device memory (30GB shape, 5,000 buffers).
#
#   bench/gpu.sh [arguments of bench/gpu.py]       OUT=folder for gpu.json, gpu.txt and gpu.log
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="${WEIGHTWIRE_SRC:-$PWD/src}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Weights in expandable segments cannot be shared between processes: plain allocations, whatever the default.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:False}"
exec timeout "${SECONDS_MAX:-450}" "${PYTHON:-python3}" bench/gpu.py "$@"
