#!/bin/bash
# Tables VI to XI of the paper on Fashion-MNIST: a ResNet18 of a quarter of the width and half the blocks,
# one epoch, a run per head, a core each.
#     bash results/ablations/run.sh runs/ablations
# leaves runs/ablations/table.md. A finished run is left as it is, so an interrupted call is simply repeated.
set -euo pipefail
runs=${1:?folder for the runs}
export OMP_NUM_THREADS=1
shared="--recipe none --dataset fashion_mnist --epochs 1 --batch-size 64 --opt momentum --lr 0.05 --weight-decay 1e-4
    --sched-on-updates --img-size 32 --crop-pct 1.0 --scale 0.8 1.0 --ratio 0.9 1.1 --clip-grad 1.0 --channels-last
    --workers 1 --resume auto"

started=0
try() {  # NAME MODEL HEAD..., the head as arguments of the model or as --noah-variant NAME
    if ((started++ >= 2)); then wait -n; fi
    python scripts/train.py --output "$runs/$1" --model "$2" $shared --model-kwargs output_stride=8 \
        "channels=(16, 32, 64, 128)" "layers=(1, 1, 1, 1)" "${@:3}" &
}

try vanilla resnet18
try noah resnet18_noah  # N=4, r=1/2
# Table VI: ratio and number of groups
for ratio in 0.25 0.125; do try ratio$ratio resnet18_noah key_ratio=$ratio; done
for groups in 1 2 8; do try groups$groups resnet18_noah key_ratio=0.125 num_groups=$groups; done
# Tables VII to XI
for variant in no_split_kv no_split channel_softmax max avg a b c d e f self_attention; do
    try $variant resnet18_noah --noah-variant $variant
done
for job in $(jobs -p); do wait "$job"; done
python scripts/report.py "$runs" | tee "$runs/table.md"
