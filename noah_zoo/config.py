"""The settings of a run."""
from dataclasses import MISSING, dataclass
from typing import Optional

from .recipes import Recipe, setting


@dataclass(kw_only=True)
class TrainConfig(Recipe):
    """One run: a recipe's hyper-parameters, and what follows. What timm's train.py has is called as it is there.

    The meanings are in the metadata of its fields, which --help and the reference show.
    """
    model: str = setting(MISSING, "A timm name, 'hf-hub:USER/MODEL' or 'local-dir:DIR'.")
    output: str = setting(MISSING, 'Folder of the run.')
    noah_variant: Optional[str] = setting(None,
        "A head of the paper's ablations instead of NOAH's: a name of `noah_zoo.layers.ablations.VARIANTS`.")
    task: str = setting('multiclass',
        "'multiclass', one class per image, 'multilabel', 'reid', re-identification, or one that was registered.")
    dataset: str = setting('fashion_mnist',
        "'fashion_mnist', 'folder', 'leaf_folder', 'hfds/NAME' or 'hfds/NAME:CONFIG', 'hfids/NAME', 'wds/', "
        "'inaturalist'; 'coco', 'csv'; 'market1501'.")
    data_dir: Optional[str] = setting(None, "Folder of the data; of 'hfds/NAME' and 'hfids/NAME' the cache.")
    input_key: Optional[str] = setting(None, "Column of the images, of 'hfds/' and 'hfids/'; 'image' if None.")
    target_key: Optional[str] = setting(None, "Column of the labels; 'label' if None.")
    train_split: str = setting('train', 'Split to train on.')
    val_split: str = setting('validation', 'Split to evaluate on.')
    val_fraction: float = setting(0.,
        'Share of the training split that is held out for evaluation; then `val_split` is not read.')
    without_labels: bool = setting(False, "Keep images of 'coco' that have no annotation.")
    skip_damaged: bool = setting(False, 'Leave out images that cannot be read, instead of stopping.')
    workers: int = setting(2, 'Data loading processes per process.')
    pretrained: bool = setting(False, 'Start from the pretrained weights.')
    keep_head: bool = setting(False,
        'Start from the pretrained head of as many classes, also if these have other names or another order.')
    grad_checkpointing: bool = setting(False, 'Recompute activations in the backward pass.')
    freeze: bool = setting(False, 'Train the head only.')
    no_aug: bool = setting(False, 'Train on the images as evaluation sees them.')
    cache_features: Optional[str] = setting(None,
        'Train the head alone, on features that the backbone gives once, of images as evaluation sees them; they are '
        'kept in this folder.')
    class_weights: bool = setting(False,
        'Weigh the loss of a class by the inverse of its share of the training images.')
    device_batch_size: Optional[int] = setting(None,
        'Largest batch of a device; accumulation makes up `batch_size`. All of its share if None.')
    channels_last: Optional[bool] = setting(None,
        'NHWC memory layout; unless given, for models whose weights are mostly those of convolutions.')
    torchcompile: bool = setting(False, 'Compile the model.')
    sync_bn: bool = setting(False, 'Batch statistics over all processes.')
    cpu: bool = setting(False, 'Do not use an accelerator.')
    seed: int = setting(0, 'Random seed.')
    checkpoint_steps: int = setting(0, 'Updates between checkpoints inside an epoch; 0 for none.')
    checkpoint_hist: int = setting(2, 'Checkpoints to keep, besides the best weights.')
    resume: Optional[str] = setting(None,
        "'auto' goes on with the newest checkpoint in `output`, if there is one; a checkpoint's folder goes back to "
        'it, or begins a branch of another run.')
    skip_nonfinite: int = setting(0,
        'Updates with a loss that is not finite to leave out before giving up; unless 0, each waits for its loss.')
    log_with: Optional[str] = setting(None, "A tracker of Accelerate, 'tensorboard' say.")
    smoke: int = setting(0,
        'A trial of two epochs: so many updates (3 without a number) and batches of evaluation; 0 for no trial.')

    def __post_init__(self) -> None:
        self.freeze = self.freeze or self.cache_features is not None
