#!/bin/bash
# The recipe 'finetune' with its defaults on few images: tf_efficientnet_lite0 with NOAH and with pooling + linear, the
# head alone on cached features or all weights, beside a logistic regression on pooled features.
#     bash results/finetune/run.sh runs/finetune frozen "0 1 2 3 4" > runs/frozen.txt
#     bash results/finetune/run.sh runs/finetune full "0 1 2" "10 20 100 stamps-128" > runs/full.txt
#     python results/finetune/table.py runs/frozen.txt runs/full.txt
# The data: 10, 20, 100 and 1,000 images of each class of Fashion-MNIST, drawn by the seed, at 128 x 128 pixels; and the
# stamps of Tux Paint at 224 x 224 ('stamps') or 128 x 128 ('stamps-128'), a quarter held out by the seed. On a core, a
# run of all weights took 11 to 26 minutes on 10 images of each class, 57 on 1,000. A finished run is left as it is, so
# an interrupted call is simply repeated. HEAD_ARGS, 'key_ratio=0.25' say, are arguments of the NOAH head.
set -euo pipefail
# Memory is kept, in large pages; see "Training on a CPU takes long" in docs/questions.md.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
runs=${1:?folder for the runs} mode=${2:?frozen or full} seeds=${3:-0 1 2 3 4} data_sets=${4:-10 20 100 1000 stamps}
more=("${@:5}")  # flags of finetune.py
python results/lite0.py "$runs/lite0" >&2
python results/stamps.py "$runs/stamps" >&2

top1() { python -c "import json, sys; print(json.load(open(sys.argv[1] + '/summary.json'))['top1'])" "$1"; }

try() {  # NAME SEED DATA..., of finetune.py and logistic.py alike
    local name=$1 seed=$2 data=("${@:3}" --seed "$2") head found
    local noah=(--model noah --no-pretrained
        --model-kwargs backbone=tf_efficientnet_lite0 "pretrained_backbone=local-dir:$runs/lite0" ${HEAD_ARGS:-})
    local linear=(--model "local-dir:$runs/lite0")
    local common=(--dataset folder "${data[@]}" --workers 0 --resume auto "${more[@]}")
    if [ "$mode" = frozen ]; then
        common+=(--cache-features "$runs/features")
        found=$(python results/finetune/logistic.py --model "local-dir:$runs/lite0" "${data[@]}")
        echo "$name $seed logistic $found"
    fi
    for head in noah linear; do
        local -n flags=$head
        python scripts/finetune.py "${flags[@]}" "${common[@]}" --output "$runs/$name-$seed-$head-$mode" >&2
        found=$(top1 "$runs/$name-$seed-$head-$mode")
        echo "$name $seed $head-$mode $found"
    done
}

for seed in $seeds; do
    for data_set in $data_sets; do
        case $data_set in
            stamps) try stamps $seed --data-dir "$runs/stamps" --val-fraction 0.25 ;;
            stamps-128) try stamps-128 $seed --data-dir "$runs/stamps" --val-fraction 0.25 --img-size 128 ;;
            *)
                folder="$runs/fashion_mnist-$data_set-$seed"
                if [ ! -d "$folder" ]; then
                    rm -rf "$folder.partial"
                    python results/finetune/subset.py --per-class $data_set --seed $seed "$folder.partial"
                    mv "$folder.partial" "$folder"
                fi
                try fashion_mnist-$data_set $seed --data-dir "$folder" --img-size 128 ;;
        esac
    done
done
