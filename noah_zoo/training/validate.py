"""The accuracy of a pretrained model on a dataset."""
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import timm
from accelerate import Accelerator
from timm.data import create_transform, resolve_data_config
from torch.utils.data import IterableDataset

from ..catalog import TAG, released_figures
from ..data.factory import create_dataset
from ..data.loader import EvalBatches, create_loader
from ..inference.export import SUFFIXES, ExportedModel
from ..models.attach import set_image_size
from .trainer import TASKS, evaluate


def validate(
        model: str,
        dataset: str = 'fashion_mnist',
        task: str = 'multiclass',
        data_dir: Optional[str] = None,
        split: str = 'validation',
        batch_size: int = 64,
        workers: int = 2,
        img_size: Optional[int] = None,
        cpu: bool = False,
) -> Dict[str, Any]:
    """Evaluate a pretrained model, with its own preprocessing, every image once on any number of processes.

    Args:
        model: A timm name, with or without tag, 'hf-hub:...' or 'local-dir:...'; or an exported file.
        dataset: As of `create_dataset`.
        task: 'multiclass' or 'multilabel'.
        data_dir: Folder of the data.
        split: Split to evaluate on.
        batch_size: Images in a batch of a process.
        workers: Data loading processes per process.
        img_size: Another image size than the model's.
        cpu: Do not use an accelerator.

    Returns:
        'top1' and 'top5' in percent, or the figures of `multilabel.Metrics` and 'per_class'; 'val_loss'; 'images',
        their number; and 'paper', the paper's figures on ImageNet-1k, if the weights are the authors'.

    Raises:
        FileNotFoundError: If the data are not there.
        RuntimeError: If the weights cannot be had.
        ValueError: If the classes of the model and the dataset do not match, or the model takes images of another size.
    """
    accelerator = Accelerator(cpu=cpu)
    if Path(model).suffix in SUFFIXES.values() and Path(model).is_file():
        net = ExportedModel(model)
    else:
        net = timm.create_model(model, pretrained=True)
    if img_size:
        set_image_size(net, img_size)
    images = create_dataset(dataset, data_dir, split, task=task)
    if getattr(images, 'labels', np.empty(0)).ndim != (2 if task == 'multilabel' else 1):
        raise ValueError(f'{dataset} is not for task {task}')
    names = net.pretrained_cfg.get('label_names')
    if net.num_classes != len(images.class_names):
        raise ValueError(
            f'{model} tells {net.num_classes} classes apart, {dataset} has {len(images.class_names)} '
            f'({", ".join(images.class_names[:3])}, ...); they have to be the same')
    stream = isinstance(images, IterableDataset)
    if names and not stream:
        images = images.with_classes(names)  # in the order of the logits
    transform = create_transform(**resolve_data_config(dict(img_size=img_size) if img_size else {}, model=net))
    sampler = None if stream else EvalBatches(
        len(images), batch_size, accelerator.num_processes, accelerator.process_index)
    loader = create_loader(images, transform, sampler, workers, batch_size)
    metrics = TASKS[task].Metrics(net.num_classes, accelerator.device)
    figures = evaluate(accelerator, net.to(accelerator.device), loader, metrics)
    result: Dict[str, Any] = {'model': model, 'dataset': dataset, 'split': split, **figures}
    if task == 'multilabel':
        result['per_class'] = metrics.per_class(images.class_names)
    if not stream:
        result['images'] = len(images)
    architecture = net.pretrained_cfg.get('architecture', '')
    paper = released_figures(architecture)
    if paper and net.pretrained_cfg.get('tag') == TAG and net.num_classes == 1000:
        result['paper'] = {'top1': paper.top1, 'top5': paper.top5}
    return result
