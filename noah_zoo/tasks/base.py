"""What a task says of itself; nobody else knows one by its name."""
from typing import Any, Dict, Sequence, Tuple

import torch
from torch import nn

from ..config import TrainConfig
from ..data.base import Images, class_changes
from ..text import some


class Task:
    """What a model is trained for: its loss, what of the model is evaluated and how, what is said of the outcome.

    A task of your own is a subclass that is given to `register_task`; see `docs/train.md`.

    Attributes:
        name: What `TrainConfig.task` calls it.
        reads: Whose labels it reads: those of 'multiclass', one class per image, 'multilabel' or 'reid'.
        figures: The figures that are shown, in percent, by what they are called there; the best epoch is that with the
            largest first one.
        on_card: Of those, the ones in a model card: type and name of the metric as the Hub has them.
        title: The task in a model card.
        pipeline_tag: The task as the Hub has it.
        draws: Whether there is something to `draw`.
        notes: What the model's pretrained cfg notes, by which `noah_zoo.inference` knows what its logits are.
    """
    name: str
    reads: str = 'multiclass'
    figures: Dict[str, str]
    on_card: Dict[str, Tuple[str, str]] = {}
    title: str = 'Image Classification'
    pipeline_tag: str = 'image-classification'
    draws: bool = False
    notes: Tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """The figure by which the best epoch is chosen."""
        return next(iter(self.figures))

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError if a setting does not go with the task; no data have been read yet."""

    def check_images(self, train_set: Images, val_set: Images) -> None:
        """Raise ValueError if nothing can be learned of the images, or no figure be told of those of evaluation; they
        may be streams, of which nobody knows."""

    def create_criterion(self, config: TrainConfig, images: Images) -> nn.Module:
        """The loss of what the model gives for a batch and its targets.

        Args:
            config: The settings.
            images: Those to train on.
        """
        raise NotImplementedError

    def eval_model(self, model: nn.Module) -> nn.Module:
        """What of the model is evaluated."""
        return model

    def create_metrics(self, num_classes: int, device: torch.device) -> Any:
        """Something with `update(outputs, targets)`, of a batch, and `compute()`, which gives the figures over what all
        processes were given: those of `figures`, and others."""
        raise NotImplementedError

    def match(self, name: str, model: nn.Module, images: Images) -> Images:
        """Images to evaluate a trained model on, labelled in the order of its logits.

        Args:
            name: The model's name, for messages.
            model: The model.
            images: The images, or a stream.

        Raises:
            ValueError: If they have other classes.
        """
        if model.num_classes != len(images.class_names):
            raise ValueError(
                f'{name} tells {model.num_classes} classes apart, the images have {len(images.class_names)} '
                f'({some(images.class_names)}); they have to be the same')
        names = model.pretrained_cfg.get('label_names')
        if isinstance(images, Images):
            return images.with_classes(names) if names else images
        changes = class_changes(names, images.class_names) if names else ''
        if changes:
            raise ValueError(f'{name} was trained for other classes than the stream has: {changes}')
        return images

    def rows(self, metrics: Any, class_names: Sequence[str]) -> Sequence[Dict[str, Any]]:
        """A row per class of what `metrics` has seen, if the task tells more than its figures."""
        return []

    def draw(self, metrics: Any, images: Images, path: str, count: int) -> None:
        """Draw what `metrics` has seen of some of the images into a PNG, in the only process."""
        raise NotImplementedError
