#!/bin/bash
# The recipe 'finetune' on few images, five seeds: a frozen tf_efficientnet_lite0 with NOAH and with pooling + linear,
# beside a logistic regression on its pooled features.
#     bash results/finetune/run.sh runs/finetune > results/finetune/frozen.txt
#     python results/finetune/table.py results/finetune/frozen.txt
# The data: 10, 20, 100 and 1,000 images of each class of Fashion-MNIST, drawn by the seed, at 128 x 128 pixels; and the
# stamps of Tux Paint at 224 x 224, a quarter held out by the seed. A finished run is left as it is, so an interrupted
# call is simply repeated.
set -euo pipefail
runs=${1:?folder for the runs}
python results/lite0.py "$runs/lite0" >&2
python results/stamps.py "$runs/stamps" >&2

top1() { python -c "import json, sys; print(json.load(open(sys.argv[1] + '/summary.json'))['top1'])" "$1"; }

try() {  # NAME SEED DATA..., of finetune.py and logistic.py alike
    local name=$1 seed=$2 data=("${@:3}" --seed "$2")
    local common=(--dataset folder "${data[@]}" --cache-features "$runs/features" --workers 0 --resume auto)
    python scripts/finetune.py --model noah --no-pretrained "${common[@]}" --output "$runs/$name-$seed-noah" \
        --model-kwargs backbone=tf_efficientnet_lite0 "pretrained_backbone=local-dir:$runs/lite0" >&2
    python scripts/finetune.py --model "local-dir:$runs/lite0" "${common[@]}" --output "$runs/$name-$seed-linear" >&2
    echo "$name $seed logistic $(python results/finetune/logistic.py --model "local-dir:$runs/lite0" "${data[@]}")"
    echo "$name $seed noah $(top1 "$runs/$name-$seed-noah")"
    echo "$name $seed linear $(top1 "$runs/$name-$seed-linear")"
}

for seed in 0 1 2 3 4; do
    try stamps $seed --data-dir "$runs/stamps" --val-fraction 0.25
    for count in 10 20 100 1000; do
        folder="$runs/fashion_mnist-$count-$seed"
        if [ ! -d "$folder" ]; then
            rm -rf "$folder.partial"
            python results/finetune/subset.py --per-class $count --seed $seed "$folder.partial"
            mv "$folder.partial" "$folder"
        fi
        try fashion_mnist-$count $seed --data-dir "$folder" --img-size 128
    done
done
