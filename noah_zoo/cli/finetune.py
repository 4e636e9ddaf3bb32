"""Fine-tune a pretrained model on images of your own.

    accelerate launch scripts/finetune.py --model resnet50_noah --dataset folder --data-dir photos --output runs/photos
    python scripts/finetune.py --model mobilenetv2_100_noah --dataset hfds/NAME --freeze --cache-features \\
        --output runs/head

As train.py, but with pretrained weights (--no-pretrained leaves them out) and, for every model, the recipe 'finetune'.
--freeze trains the head alone, --layer-decay lowers the learning rate from layer to layer. Another head starts on the
backbone of a timm model with --model noah --no-pretrained --model-kwargs backbone=NAME pretrained_backbone=NAME. The
recipe has 15 epochs of 20 updates or more, and bf16 on a GPU that has it.
"""


def main(prog: str = 'finetune.py') -> None:
    from noah_zoo.cli.train import main as train

    train(prog, __doc__, recipe='finetune', pretrained=True)


if __name__ == '__main__':
    main()
