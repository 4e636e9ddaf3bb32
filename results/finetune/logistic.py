"""Logistic regression on pooled features: what a head on a frozen backbone has to reach.

    python results/finetune/logistic.py --model local-dir:runs/lite0 --data-dir runs/subset --img-size 128
    python results/finetune/logistic.py --model local-dir:runs/lite0 --data-dir runs/stamps --val-fraction 0.25 --seed 1

scikit-learn's, on features of the images as evaluation sees them, its regularization chosen by five-fold
cross-validation of the training images. Prints the accuracy in percent on the validation images.
"""
import argparse
import warnings

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegressionCV

from noah_zoo.config import TrainConfig
from noah_zoo.data.factory import create_datasets
from noah_zoo.models.attach import eval_transform


@torch.inference_mode()
def pooled(model: torch.nn.Module, images, transform) -> np.ndarray:
    loader = torch.utils.data.DataLoader(
        [transform(images.read(i)[0]) for i in range(len(images))], batch_size=64)
    return torch.cat([model(x) for x in loader]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model', required=True)
    add('--data-dir', required=True)
    add('--val-fraction', type=float, default=0.)
    add('--seed', type=int, default=0)
    add('--img-size', type=int)
    args = parser.parse_args()
    model = timm.create_model(args.model, pretrained=True, num_classes=0).eval()
    transform = eval_transform(model, args.img_size)
    sets = create_datasets(TrainConfig(
        model='', output='', dataset='folder', data_dir=args.data_dir, val_fraction=args.val_fraction, seed=args.seed))
    (x, y), (val_x, val_y) = ((pooled(model, images, transform), images.labels[images.rows]) for images in sets)
    warnings.simplefilter('ignore')  # classes with fewer images than folds
    found = LogisticRegressionCV(Cs=np.logspace(-3, 1, 9), cv=5, max_iter=3000).fit(x, y)
    print(f'{100 * found.score(val_x, val_y):.2f}')


if __name__ == '__main__':
    main()
