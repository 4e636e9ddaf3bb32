"""A head that starts from the classifier that is there, compared with a new one, on features of a frozen backbone.

    python results/first_weights/from_classifier.py --backbone runs/lite0 --output runs/first_weights

Pooling and a linear layer are trained for 20 epochs on 3,000 images of Fashion-MNIST, as in frozen.py; then NOAH, from
that classifier (with `split_kv` and without) and anew, for 0, 1, 5 and 20. Means of three seeds.
"""
import argparse
import json
import statistics
from pathlib import Path

import timm
from frozen import data_of, run

from noah_zoo import NoahHead
from noah_zoo.benchmark.probe import PoolLinear

EPOCHS = (0, 1, 5, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', required=True)
    parser.add_argument('--output', required=True)
    args = parser.parse_args()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(f'local-dir:{args.backbone}', pretrained=True).eval()
    data = data_of(model, 10, output)
    scores = {}
    for seed in range(3):
        kept = []

        def linear(kept=kept):
            kept.append(PoolLinear(data[0].shape[-1], 10))
            return kept[0]

        scores.setdefault('linear, 20 epochs', []).append(run(linear, *data, 1e-3, 20, seed))
        for epochs in EPOCHS:
            for name, split_kv in (('from the classifier', True), ('from the classifier, split_kv=False', False),
                                   ('anew', True)):
                def noah(name=name, split_kv=split_kv, kept=kept):
                    head = NoahHead(data[0].shape[-1], 10, 8, 1 / 8, split_kv=split_kv, input_fmt='NLC')
                    if name == 'anew':
                        head.begin_as_pooling()
                    else:
                        head.begin_as_linear(kept[0].weight, kept[0].bias)
                    return head

                scores.setdefault(f'{name}, {epochs} epochs', []).append(run(noah, *data, 1e-3, epochs, seed))
    for name, values in scores.items():
        print(f'{name}: {statistics.mean(values):.2f}', [round(v, 2) for v in values], flush=True)
    (output / 'from_classifier.json').write_text(json.dumps(scores, indent=1) + '\n')


if __name__ == '__main__':
    main()
