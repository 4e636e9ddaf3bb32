"""The settings of a run."""
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Optional, Tuple

from .recipes import Recipe, setting


def default_dataset(data_dir: Optional[str]) -> str:
    """The dataset if only its folder is given, or nothing: 'folder', and 'fashion_mnist' for its IDX files."""
    return 'fashion_mnist' if data_dir is None or any(Path(data_dir).glob('*-idx3-ubyte*')) else 'folder'


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
    dataset: Optional[str] = setting(None,
        "'folder' (the default with `data_dir`), 'leaf_folder', 'csv', 'hfds/NAME' or 'hfds/NAME:CONFIG', "
        "'hfids/NAME', 'wds/', 'coco', 'inaturalist', 'market1501', 'fashion_mnist'.")
    data_dir: Optional[str] = setting(None, "Folder of the data; of 'hfds/NAME' and 'hfids/NAME' the cache.")
    input_key: Optional[str] = setting(None,
        "Column of the images; if None, 'image' of 'hfds/' and 'hfids/' and 'file_name' of 'csv'.")
    target_key: Optional[str] = setting(None, "Column of the labels; if None, 'label', or 'labels' of multilabel.")
    label_separator: Optional[str] = setting(None, "Text between the labels of an image, of 'csv'; ';' if None.")
    train_split: str = setting('train', 'Split to train on.')
    val_split: str = setting('validation', 'Split to evaluate on.')
    val_fraction: float = setting(0.,
        'Share of the training split that is held out for evaluation; then `val_split` is not read.')
    split_from: Optional[str] = setting(None,
        'Folder of an earlier run whose training and validation images stay what they are; `val_fraction` splits the '
        'images that it does not have.')
    value_range: Optional[Tuple[float, float]] = setting(None,
        'Lowest and highest value of 16-bit and floating-point images, which become black and white; by the file type '
        'if None: 0 to 65535, and 0 to 1.')
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
    project: str = setting('noah_zoo', 'Name of the project in the tracker.')
    smoke: int = setting(0,
        'A trial of two epochs: so many updates (3 without a number) and batches of evaluation; 0 for no trial.')

    def __post_init__(self) -> None:
        self.dataset = self.dataset or default_dataset(self.data_dir)
        self.freeze = self.freeze or self.cache_features is not None
