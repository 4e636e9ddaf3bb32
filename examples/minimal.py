"""A NOAH head on a timm backbone, trained on images in a folder per class: all of it, to copy from.

    python examples/minimal.py photos --backbone resnet18 --pretrained
"""
import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import noah_zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='with a folder of images per class')
    parser.add_argument('--backbone', default='mobilenetv2_050', help='any timm model (mobilenetv2_050)')
    parser.add_argument('--pretrained', action='store_true', help='start from its ImageNet weights')
    parser.add_argument('--epochs', type=int, default=10)
    args = parser.parse_args()
    if not Path(args.folder).is_dir() or not timm.is_model(args.backbone.split('.')[0]):
        parser.error(f'{args.folder} has to be a folder, and {args.backbone} a model of timm.list_models()')
    torch.manual_seed(0)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

    # The backbone is timm's; only its classifier becomes a NOAH head.
    train_set, test_set = (create_dataset('', root=args.folder) for _ in range(2))
    model = timm.create_model(args.backbone, pretrained=args.pretrained, num_classes=len(train_set.reader.class_to_idx))
    noah_zoo.add_noah_head(model, init='pooling' if args.pretrained else 'random').to(device)

    # Every fifth image is held out. timm's transforms follow from the model.
    config = resolve_model_data_config(model)
    train_set.transform = create_transform(**config, is_training=True)
    test_set.transform = create_transform(**config)
    held_out = set(range(0, len(train_set), 5))
    rest = [i for i in range(len(train_set)) if i not in held_out]
    train_loader = DataLoader(Subset(train_set, rest), batch_size=32, shuffle=True)
    test_loader = DataLoader(Subset(test_set, sorted(held_out)), batch_size=32)

    # The new head learns ten times as fast as the backbone.
    head = list(model.get_classifier().parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = torch.optim.AdamW([dict(params=body, lr=1e-4), dict(params=head, lr=1e-3)], weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_loader))

    for epoch in range(args.epochs):
        model.train()
        for images, labels in train_loader:
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        model.eval()
        with torch.inference_mode():
            hits = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in test_loader)
        print(f'epoch {epoch + 1}: loss {loss.item():.3f}, top-1 {100 * hits / len(held_out):.1f} %', flush=True)

    # Where it looked, on one image.
    images, _ = next(iter(test_loader))
    maps = noah_zoo.attention_maps(model, images[:1].to(device))
    print(f'attention (images, blocks, classes, height, width): {tuple(maps.attention.shape)}')


if __name__ == '__main__':
    main()
