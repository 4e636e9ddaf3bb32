"""First weights of the head, compared on features of a frozen backbone with real ImageNet-1k weights.

    python results/lite0.py runs/lite0
    python results/first_weights/frozen.py --backbone runs/lite0 --classes 2 10 37 100 1000 --groups 1 4 8 \
        --output runs/first_weights

Heads of 2 and 10 classes see single images of Fashion-MNIST (T-shirts against shirts; all), 300 of each class, at 4 x 4
positions; heads of 37 and 100 classes two of them side by side, the class being which on the left and which on the
right, 3,000 in all at 3 x 6 positions; heads of 1,000 classes three, 3,000 in all at 2 x 6 positions. A seed chooses
the training images from twice as many, their order and the first weights; 2,000 (two classes) to 5,000 images made of
the test split in the same way are the same for all. Everything else is equal: AdamW, weight decay 0.05, label smoothing
0.1, gradients clipped at 1, batches of 64, an epoch of warm-up and cosine. Every line is trained with every learning
rate of --lr; the table has the best mean, of every line alike.

A candidate with '+r8' gives an eighth of the channels to the keys, and so on; '+all' gives all to keys and values
alike, `split_kv=False`; the others have the ratios in KEY_RATIO.

A line per setting goes to OUTPUT/frozen.jsonl when it is done; a repeated call goes on after the last one. OUTPUT is
for one backbone, whose features stay there.
"""
import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn

import noah_zoo
from noah_zoo.benchmark.probe import PoolLinear
from noah_zoo.data.fashion_mnist import FASHION_MNIST_DIR, FashionMnist

SIDE = {1: 128, 2: 96, 3: 64}  # pixels of a garment, by how many are side by side
KEY_RATIO = {1: 1 / 2, 4: 1 / 4, 8: 1 / 4}


def draw(split: str, num_classes: int, count: int, seed: int):
    """Images (count, 28, n * 28) and labels: `count` spread evenly over the classes."""
    images = FashionMnist(FASHION_MNIST_DIR, split)
    rng = np.random.Generator(np.random.PCG64(seed))
    by_class = [np.flatnonzero(images.labels == k) for k in range(10)]
    if num_classes == 2:
        names = [(0,), (6,)]
    elif num_classes == 10:
        names = [(k,) for k in range(10)]
    else:
        digits = 2 if num_classes <= 100 else 3
        order = np.random.Generator(np.random.PCG64(0)).permutation(10 ** digits)[:num_classes]
        names = [tuple(int(c) for c in f'{n:0{digits}}') for n in order]
    labels = np.arange(count) % num_classes
    rows = [[rng.choice(by_class[k]) for k in names[label]] for label in labels]
    return np.stack([np.concatenate(images.images[row], axis=1) for row in rows]), torch.from_numpy(labels)


@torch.inference_mode()
def features_of(model: nn.Module, images: np.ndarray) -> torch.Tensor:
    """(count, L, C) of the model's last map."""
    side = SIDE[images.shape[2] // 28]
    size = (side, side * (images.shape[2] // 28))
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    rows = []
    for batch in torch.from_numpy(images).split(100):
        x = F.interpolate(batch.unsqueeze(1).float() / 255, size, mode='bicubic', align_corners=False).clamp(0, 1)
        rows.append(model.forward_features((x.expand(-1, 3, -1, -1) - mean) / std).flatten(2).transpose(1, 2))
    return torch.cat(rows).contiguous()


def data_of(model: nn.Module, num_classes: int, output: Path):
    """Features and labels to train on, twice as many as a run has, and to test on; the features stay in `output`."""
    train_images, y = draw('train', num_classes, 1200 if num_classes == 2 else 6000, 1)
    test_images, test_y = draw('test', num_classes, 2000 if num_classes == 2 else 5000, 2)
    cache = output / f'features-{num_classes}.pt'
    if not cache.exists():
        torch.save((features_of(model, train_images), features_of(model, test_images)), cache)
    x, test_x = torch.load(cache)
    return x, y, test_x, test_y


def start(head: noah_zoo.NoahHead, name: str) -> None:
    """The candidates; biases are zero in all of them. 'scores_S' gives features of standard deviation 1 scores of S."""
    n, k = head.num_groups, head.num_classes
    per_score, per_logit = head.key.weight.shape[1], n * head.value.weight.shape[1]  # weights of a score, of a logit
    key, value = {
        'fan_out': (math.sqrt(2 / (n * k)),) * 2,  # the authors' release
        'as_1000': (math.sqrt(2 / (n * 1000)),) * 2,  # the same, as for 1,000 classes
        'std_0.01': (0.01, 0.01),  # as timm's heads
        'zero': (0., 0.),
        'scores_0': (0., 0.3 / math.sqrt(per_logit)),  # it begins as pooling
        'scores_0.5': (0.5 / math.sqrt(per_score), 0.3 / math.sqrt(per_logit)),
        'scores_1': (1 / math.sqrt(per_score), 0.3 / math.sqrt(per_logit)),
    }[name]
    for layer, std in ((head.key, key), (head.value, value)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def run(make, x, y, test_x, test_y, lr: float, epochs: int, seed: int) -> float:
    """Test top-1 of a head after training."""
    half = np.random.Generator(np.random.PCG64(seed)).permutation(len(x))[:len(x) // 2]
    x, y = x[half], y[half]
    torch.manual_seed(seed)
    head = make()
    decay = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=0.05), dict(params=others, weight_decay=0.)], lr=lr)
    per_epoch = len(x) // 64
    total = epochs * per_epoch
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(x))
        rows = order[step % per_epoch * 64:][:64]
        factor = min((step + 1) / per_epoch, 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in opt.param_groups:
            group['lr'] = lr * factor
        F.cross_entropy(head(x[rows]), y[rows], label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    with torch.inference_mode():
        head.eval()
        hits = sum((head(a).argmax(1) == b).sum().item() for a, b in zip(test_x.split(256), test_y.split(256)))
    return 100 * hits / len(test_x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--backbone', required=True)
    add('--output', required=True)
    add('--classes', type=int, nargs='+', default=[2, 10, 37, 100, 1000])
    add('--groups', type=int, nargs='+', default=[1, 4, 8])
    add('--candidates', nargs='+',
        default=['fan_out', 'as_1000', 'std_0.01', 'zero', 'scores_0', 'scores_0.5', 'scores_1'])
    add('--lr', type=float, nargs='+', default=[3e-4, 1e-3])
    add('--epochs', type=int, default=20)
    add('--seeds', type=int, default=5)
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    log = output / 'frozen.jsonl'
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row['classes'], row['groups'], row['head']) for row in done}
    model = timm.create_model(f'local-dir:{args.backbone}', pretrained=True).eval()
    for k in args.classes:
        x, y, test_x, test_y = data_of(model, k, output)
        epochs = 3 * args.epochs if k == 2 else args.epochs
        cases = [(0, 'linear')] + [(n, name) for name in args.candidates for n in args.groups]
        for n, name in cases:
            if (k, n, name) in done:
                continue

            def make(k=k, n=n, name=name, width=x.shape[-1]):
                if not n:
                    return PoolLinear(width, k)
                candidate, _, split = name.partition('+')
                ratio = 1 / int(split[1:]) if split.startswith('r') else KEY_RATIO[n]
                head = noah_zoo.NoahHead(width, k, n, ratio, input_fmt='NLC', split_kv=split != 'all')
                start(head, candidate)
                return head

            began = time.time()
            seeds = range(args.seeds)
            scores = {lr: [run(make, x, y, test_x, test_y, lr, epochs, seed) for seed in seeds] for lr in args.lr}
            means = {lr: round(statistics.mean(values), 2) for lr, values in scores.items()}
            lr = max(means, key=means.get)
            row = dict(classes=k, groups=n, head=name, lr=lr, mean=means[lr], means=means, top1=scores[lr],
                       seconds=round(time.time() - began))
            with log.open('a') as file:
                file.write(json.dumps(row) + '\n')
            print(k, n, name, lr, row['mean'], means, row['seconds'], flush=True)


if __name__ == '__main__':
    main()
