"""Floor 4: the settings of a run."""
from dataclasses import dataclass
from typing import Optional

from ..recipes import Recipe


@dataclass(kw_only=True)
class TrainConfig(Recipe):
    """One run: a recipe's hyper-parameters, and what follows. Names and meanings are those of timm's train.py.

    Attributes:
        model: A timm name.
        output: Folder of the run.
        noah_variant: A head of the paper's ablations instead of NOAH's: a name of `noah_zoo.ablations.VARIANTS`.
        task: 'multiclass', one class per image, 'multilabel', or 'reid', re-identification.
        dataset: 'fashion_mnist', 'folder', 'inaturalist', a name of `timm.data.create_dataset`; 'coco', 'csv';
            'market1501'.
        data_dir: Folder of the data.
        input_key: Column of the images, of 'hfds/' and 'hfids/'; 'image' if None.
        target_key: Column of the labels; 'label' if None.
        train_split: Split to train on.
        val_split: Split to evaluate on.
        val_fraction: Share of the training split that is held out for evaluation; then `val_split` is not read.
        without_labels: Keep images of 'coco' that have no annotation.
        skip_damaged: Leave out images that cannot be read, instead of stopping.
        workers: Data loading processes per process.
        pretrained: Start from the pretrained weights.
        grad_checkpointing: Recompute activations in the backward pass.
        freeze: Train the head only.
        no_aug: Train on the images as evaluation sees them.
        cache_features: Train the head alone, on features that the backbone gives once, of images as evaluation sees
            them; they are kept in this folder.
        class_weights: Weigh the loss of a class by the inverse of its share of the training images.
        device_batch_size: Largest batch of a device; accumulation makes up `batch_size`. All of its share if None.
        channels_last: NHWC memory layout; unless given, for models whose weights are mostly those of convolutions.
        torchcompile: Compile the model.
        sync_bn: Batch statistics over all processes.
        cpu: Do not use an accelerator.
        seed: Random seed.
        checkpoint_steps: Updates between checkpoints inside an epoch; 0 for none.
        checkpoint_hist: Checkpoints to keep, besides the best weights.
        resume: 'auto' goes on with the newest checkpoint in `output`, if there is one; or a checkpoint's folder.
        skip_nonfinite: Updates with a loss that is not finite to leave out before giving up.
        log_with: A tracker of Accelerate, 'tensorboard' say.
        smoke: A trial of two epochs: so many updates (3 without a number) and batches of evaluation; 0 for no trial.
    """
    model: str
    output: str
    noah_variant: Optional[str] = None
    task: str = 'multiclass'
    dataset: str = 'fashion_mnist'
    data_dir: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    train_split: str = 'train'
    val_split: str = 'validation'
    val_fraction: float = 0.
    without_labels: bool = False
    skip_damaged: bool = False
    workers: int = 2
    pretrained: bool = False
    grad_checkpointing: bool = False
    freeze: bool = False
    no_aug: bool = False
    cache_features: Optional[str] = None
    class_weights: bool = False
    device_batch_size: Optional[int] = None
    channels_last: Optional[bool] = None
    torchcompile: bool = False
    sync_bn: bool = False
    cpu: bool = False
    seed: int = 0
    checkpoint_steps: int = 0
    checkpoint_hist: int = 2
    resume: Optional[str] = None
    skip_nonfinite: int = 0
    log_with: Optional[str] = None
    smoke: int = 0

    def __post_init__(self) -> None:
        self.freeze = self.freeze or self.cache_features is not None
