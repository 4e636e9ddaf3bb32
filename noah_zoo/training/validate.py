"""The accuracy of a pretrained model on a dataset."""
import logging
from pathlib import Path
from typing import Any, Dict, Optional

import timm
from accelerate import Accelerator
from torch.utils.data import IterableDataset

from ..catalog import TAG, paper_results
from ..config import default_dataset
from ..data.factory import create_dataset
from ..data.folder import Folder
from ..data.loader import EvalBatchSampler, create_loader, on_device
from ..inference.export import SUFFIXES, ExportedModel
from ..inference.predict import check_model, read_for
from ..models.attach import data_config_of, eval_transform, set_image_size
from ..tasks import find_task
from .trainer import evaluate

_logger = logging.getLogger(__name__)


def validate(
        model: str,
        dataset: Optional[str] = None,
        task: str = 'multiclass',
        data_dir: Optional[str] = None,
        split: str = 'validation',
        input_key: Optional[str] = None,
        target_key: Optional[str] = None,
        without_labels: bool = False,
        label_separator: Optional[str] = None,
        batch_size: int = 64,
        workers: int = 2,
        img_size: Optional[int] = None,
        cpu: bool = False,
        picture: Optional[str] = None,
        pictured: int = 6,
) -> Dict[str, Any]:
    """Evaluate a pretrained model, with its own preprocessing, every image once on any number of processes.

    Args:
        model: A timm name, with or without tag, 'hf-hub:...' or 'local-dir:...'; or an exported file.
        dataset: As of `create_dataset`; as of `default_dataset` if None.
        task: A name of `noah_zoo.tasks.TASKS`.
        data_dir: Folder of the data.
        split: Split to evaluate on; of a folder without splits, all images.
        input_key: As of `create_dataset`.
        target_key: As of `create_dataset`.
        without_labels: As of `create_dataset`.
        label_separator: As of `create_dataset`.
        batch_size: Images in a batch of a process.
        workers: Data loading processes per process.
        img_size: Another image size than the model's.
        cpu: Do not use an accelerator.
        picture: A PNG to draw what was found into, by a task that has something to draw: 'reid', its rankings.
        pictured: How many images it is drawn of.

    Returns:
        'split'; what the task's metrics give, 'top1' and 'top5' in percent and 'val_loss', say; 'per_class', a row per
        class, of 'multilabel'; 'images', their number; and 'paper', the paper's figures on ImageNet-1k, if the weights
        are the authors'.

    Raises:
        FileNotFoundError: If the data are not there.
        RuntimeError: If the weights cannot be had.
        ValueError: If the classes of the model and the dataset do not match, or the model takes images of another size.
    """
    judge, dataset = find_task(task), dataset or default_dataset(data_dir)
    accelerator = Accelerator(cpu=cpu)
    if picture and not judge.draws:
        raise ValueError(f'picture={picture!r}: the task {task} has none')
    if picture and accelerator.num_processes > 1:
        raise ValueError(f'picture={picture!r}: it is drawn by one process, here are {accelerator.num_processes}')
    is_exported = Path(model).suffix in SUFFIXES.values() and Path(model).is_file()
    if not is_exported:
        check_model(model)
    images = create_dataset(
        dataset, data_dir, split, task=judge.reads, input_key=input_key, target_key=target_key,
        without_labels=without_labels, label_separator=label_separator)
    if images.task != judge.reads:
        raise ValueError(f'{dataset} is for --task {images.task}, and the task is {task}')
    if isinstance(images, Folder) and images.root == Path(data_dir):
        _logger.warning(
            '%s has no folder for split %r: all its images are evaluated, also those that a model was trained on',
            data_dir, split)
        split = 'all images'
    net = ExportedModel(model) if is_exported else timm.create_model(model, pretrained=True)
    if img_size:
        set_image_size(net, img_size)
    images = judge.match(model, net, images)
    stream = isinstance(images, IterableDataset)
    read_for(net, images)
    transform = eval_transform(net, img_size, normalize=False)
    sampler = None if stream else EvalBatchSampler(
        len(images), batch_size, accelerator.num_processes, accelerator.process_index)
    loader = create_loader(images, transform, sampler, workers, batch_size)
    loader = on_device(loader, data_config_of(net), accelerator.device)
    metrics = judge.create_metrics(net.num_classes, accelerator.device)
    figures = evaluate(accelerator, judge.eval_model(net.to(accelerator.device)), loader, metrics)
    if picture:
        judge.draw(metrics, images, picture, pictured)
    result: Dict[str, Any] = {'model': model, 'dataset': dataset, 'split': split, **figures}
    rows = judge.rows(metrics, images.class_names)
    if rows:
        result['per_class'] = rows
    if not stream:
        result['images'] = len(images)
    architecture = net.pretrained_cfg.get('architecture', '')
    paper = paper_results(architecture)
    if paper and 'top1' in figures and net.pretrained_cfg.get('tag') == TAG and net.num_classes == 1000:
        result['paper'] = {'top1': paper.top1, 'top5': paper.top5}
    return result
