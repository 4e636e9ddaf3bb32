#!/bin/bash
# Seven vanilla-NOAH pairs on Fashion-MNIST, 4 x 4 positions each: one epoch, three seeds, the two models of a pair side
# by side, a core each.
#     bash results/fashion_mnist_pairs/run.sh runs/pairs
# A finished run is left as it is, so an interrupted call is simply repeated.
set -euo pipefail
runs=${1:?folder for the runs}
export OMP_NUM_THREADS=1
shared="--recipe none --dataset fashion_mnist --epochs 1 --batch-size 64 --sched-on-updates --crop-pct 1.0
    --scale 0.8 1.0 --ratio 0.9 1.1 --clip-grad 1.0 --workers 1 --resume auto"
cnn="--opt momentum --lr 0.05 --weight-decay 1e-4"
token="--opt adamw --lr 1e-3 --weight-decay 0.05"

pair() {  # SEED MODEL FLAGS...
    for model in "$2" "$2_noah"; do
        python scripts/train.py --model "$model" --seed "$1" --output "$runs/$model-seed$1" $shared "${@:3}" &
        jobs[${#jobs[@]}]=$!
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    jobs=()
}

jobs=()
for seed in 0 1 2; do
    pair $seed mobilenetv2_035 $cnn --img-size 32 --model-kwargs output_stride=8
    pair $seed deit_tiny_050_patch16_224 $token --img-size 32 --model-kwargs patch_size=8
    pair $seed gmlp_ti16_050_224 $token --img-size 32 --model-kwargs patch_size=8
    pair $seed shufflenetv2_100 $cnn --img-size 128
    pair $seed resnet18 $cnn --img-size 32 --model-kwargs output_stride=8
    pair $seed mixer_s16_050_224 $token --img-size 32 --model-kwargs patch_size=8
    pair $seed pvt_tiny_050 $token --img-size 128
done
