#!/usr/bin/env bash
# From a fresh clone to a trained vision transformer with 16 heads per block and the single-head
# performance of every head, on real images (scikit-learn's handwritten digits). CPU is enough.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv train,data,report

run=${1:-runs/demo-$(date +%Y%m%d-%H%M%S)}
# dropout and stochastic depth are for longer runs than this one
.venv/bin/lsmha train --data digits --model cct_2_3x2_32 --num-heads 16 --epochs 20 \
    --batch-size 32 --lr 1e-3 --warmup-epochs 2 --attn-drop 0 --drop-path 0 --out "$run"
.venv/bin/lsmha shp "$run"
