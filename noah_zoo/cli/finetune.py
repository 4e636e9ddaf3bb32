"""Fine-tune a pretrained model on your own images.

    noah-zoo finetune --model resnet50_noah --dataset folder --data-dir photos --val-fraction 0.2 --output runs/photos
    noah-zoo finetune --model mobilenetv2_100_noah --dataset hfds/NAME --freeze --cache-features --output runs/head

The command is `train` with pretrained weights (--no-pretrained: without) and the recipe 'finetune' for every model: 15
epochs of 20 optimizer steps or more, and bfloat16 on a GPU that supports it. --freeze trains the head only,
--layer-decay lowers the learning rate from layer to layer. Put a head on the backbone of any timm model with --model
noah --no-pretrained --model-kwargs backbone=NAME pretrained_backbone=NAME. `accelerate launch -m noah_zoo finetune ...`
trains on several devices.
"""
from . import train
from .train import run

__all__ = ['parse_args', 'run']


def parse_args(argv, prog):
    return train.parse_args(argv, prog, __doc__, recipe='finetune', pretrained=True)
