"""The paper's training settings, as arguments of noah_zoo.training, named as those of timm's train.py."""
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from .catalog import FAMILIES, find_row


def setting(default: Any, help: str) -> Any:
    """A field of a dataclass, with what it means. `dataclasses.MISSING` makes it required; a type makes the default."""
    given = dict(default_factory=default) if isinstance(default, type) else dict(default=default)
    return field(**given, metadata=dict(help=help))


@dataclass
class Recipe:
    """Hyper-parameters of a run.

    The meanings are in the metadata of its fields, which --help and the reference show.
    """
    epochs: int = setting(100, 'Epochs.')
    epoch_updates: int = setting(0,
        'Updates that an epoch has at least: where there are few images, it passes over them several times. Where '
        '`epochs` is given and this is not, an epoch is one pass; so it is of streams.')
    batch_size: int = setting(128, 'Images per update, over all processes and accumulation steps.')
    opt: str = setting('sgd', "Optimizer of timm.optim; 'momentum' is SGD without Nesterov momentum.")
    amsgrad: bool = setting(False, 'Adam with AMSGrad.')
    opt_eps: Optional[float] = setting(None, 'Epsilon of the optimizer; its own if None.')
    momentum: float = setting(0.9, "Momentum of SGD; timm leaves Adam's betas, 0.9 and 0.999, as they are.")
    weight_decay: float = setting(1e-4, 'Weight decay.')
    decay_norms: bool = setting(False, 'Weight decay on norms and biases, too.')
    lr: Optional[float] = setting(None, 'Highest learning rate; if None, `lr_base` x `batch_size` / `lr_base_size`.')
    lr_base: float = setting(0.1, 'See `lr`.')
    lr_base_size: int = setting(256, 'See `lr`.')
    sched: str = setting('cosine',
        "Scheduler of timm.scheduler, 'poly' with `decay_rate` 1 being a straight line; or 'onecycle', PyTorch's with "
        "every update.")
    sched_on_updates: bool = setting(False, 'Step the scheduler with every update, not every epoch.')
    decay_epochs: float = setting(30, "Epochs between steps of 'step'.")
    decay_rate: float = setting(0.1, "Factor of 'step' and 'multistep', exponent of 'poly'.")
    decay_milestones: Tuple[int, int, int] = setting((90, 180, 270), "Epochs at which 'multistep' steps.")
    warmup_epochs: int = setting(0, 'Epochs of linear warm-up.')
    warmup_lr: float = setting(1e-5, 'Learning rate at its start.')
    min_lr: float = setting(0., 'Learning rate at the end.')
    layer_decay: Optional[float] = setting(None, 'Factor of the learning rate from layer to layer, from the head down.')
    head_lr_factor: float = setting(1., "Factor of the head's learning rate.")
    freeze_epochs: int = setting(0, 'Epochs at the beginning in which only the head trains.')
    freeze_bn: bool = setting(False, 'Batch norms keep the statistics they have; those that have none yet learn them.')
    clip_grad: Optional[float] = setting(None, 'Largest norm of the gradient.')
    mixed_precision: Optional[str] = setting(None,
        "'no', 'fp16' or 'bf16'; that of `accelerate config` if None. 'auto' is bf16 on a GPU that has it where "
        "`accelerate config` says 'no', as it does unless told otherwise.")
    loss: str = setting('bce', "Of multi-label training: 'bce', binary cross-entropy, or 'asl', asymmetric loss.")
    img_size: Optional[int] = setting(None, "Image size; the model's if None.")
    train_crop: str = setting('rrc',
        "How images are cropped in training: 'rrc', at random size and aspect ratio; 'random', anywhere in the image "
        "as evaluation resizes it; 'squash', not at all, whatever their aspect ratio.")
    scale: Tuple[float, float] = setting((0.08, 1.), "Area range of 'rrc'.")
    ratio: Tuple[float, float] = setting((3 / 4, 4 / 3), "Aspect ratio range of 'rrc'.")
    hflip: float = setting(0.5, 'Probability of a horizontal flip.')
    color_jitter: Optional[float] = setting(None, 'Strength of colour jitter; `aa` takes its place.')
    aa: Optional[str] = setting(None, "AutoAugment or RandAugment, in timm's notation.")
    reprob: float = setting(0., 'Probability of random erasing, by random pixels.')
    mixup: float = setting(0., 'Alpha of mixup.')
    cutmix: float = setting(0., 'Alpha of CutMix.')
    mixup_switch_prob: float = setting(0.5, 'Probability of CutMix where both are on.')
    aug_repeats: int = setting(0, "Times that an image is in an epoch's batches, augmented anew; 0 is once.")
    smoothing: float = setting(0., 'Label smoothing.')
    drop_path: Optional[float] = setting(None, 'Stochastic depth rate of the last block.')
    model_ema_decay: Optional[float] = setting(None,
        'Decay of averaged weights, which are then evaluated and kept; None for none.')
    interpolation: Optional[str] = setting(None,
        "How images are resized, 'bilinear' or 'bicubic'; the model's if None.")
    train_interpolation: Optional[str] = setting(None, "The same in training, 'random' too; `interpolation` if None.")
    crop_pct: Optional[float] = setting(None, "Share of the image that evaluation crops; the model's if None.")
    crop_mode: Optional[str] = setting(None,
        "How evaluation crops, 'center', 'squash' or 'border'; the model's if None.")
    model_kwargs: Dict[str, Any] = setting(dict, 'More arguments of the model.')


_CNN = dict(opt='momentum', momentum=0.9, interpolation='bilinear', crop_pct=0.875)  # supplement; the last two: command
_VIT = dict(
    epochs=300, batch_size=1024, opt='adamw', weight_decay=0.05,  # supplement, DeiT and PVT; its momentum: timm's beta
    lr_base=5e-4, lr_base_size=512,  # the supplement's 5e-4 is the command's flag, which it scales by batch / 512
    sched='cosine', warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,  # command; the supplement lets it end at zero
    smoothing=0.1, aa='rand-m9-mstd0.5-inc1', reprob=0.25, mixup=0.8, cutmix=1.,  # supplement names, command's values
    aug_repeats=3, drop_path=0.1, interpolation='bicubic', crop_pct=0.875)  # command
_MLP = Recipe(
    epochs=300, batch_size=1536, opt='adamw', lr=7e-4, weight_decay=0.067,  # supplement, Mixer and gMLP
    opt_eps=1e-6, sched='cosine', warmup_epochs=20, warmup_lr=1e-6, min_lr=1e-5,  # command; the supplement ends at zero
    smoothing=0.1, aa='rand-m6-n3-mstd1.0-inc1', mixup=0.5, cutmix=1.,  # supplement names, command's values
    reprob=0.,  # command; the supplement names random erasing
    color_jitter=0.4, ratio=(0.67, 1.5), drop_path=0.1, clip_grad=1., model_ema_decay=0.99992,  # command
    interpolation='bicubic', train_interpolation='random', crop_pct=0.9,  # command
    model_kwargs=dict(proj_drop_rate=0.02333))  # command
RECIPES: Dict[str, Recipe] = {
    'resnet': Recipe(
        **_CNN, epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4,  # supplement, ResNet
        sched='step', decay_epochs=30, decay_rate=0.1,  # supplement, ResNet
        decay_norms=True),  # command
    'mobilenet': Recipe(
        **_CNN, epochs=150, batch_size=256, lr=0.05, weight_decay=4e-5,  # supplement, MobileNet
        sched='cosine', min_lr=0.,  # supplement, MobileNet; per epoch: command
        decay_norms=True),  # command
    'shufflenet': Recipe(
        **_CNN, epochs=240, batch_size=1024, lr=0.5, weight_decay=4e-5,  # supplement, ShuffleNetV2
        sched='poly', decay_rate=1., min_lr=0.,  # supplement, ShuffleNetV2: linearly to zero; per epoch: command
        decay_norms=False),  # command
    'deit': Recipe(**_VIT, color_jitter=0.3, model_ema_decay=0.99996),  # command
    'pvt': Recipe(**_VIT, color_jitter=0.4),  # command
    'mixer': _MLP,
    'gmlp': _MLP,
    'aggressive': Recipe(
        epochs=300, batch_size=4096, opt='adamw', lr=4e-3, weight_decay=0.05,  # supplement, Table XVI
        sched='cosine', warmup_epochs=20,  # supplement
        sched_on_updates=True, warmup_lr=0., min_lr=1e-6,  # ConvNeXt
        smoothing=0.1, aa='rand-m9-mstd0.5-inc1', reprob=0.25, mixup=0.8, cutmix=1.,  # supplement, ConvNeXt's values
        model_ema_decay=0.9999,  # supplement; ConvNeXt's value
        color_jitter=0.4, interpolation='bicubic', crop_pct=0.875),  # ConvNeXt
    'inaturalist': Recipe(
        **_CNN, epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4,  # supplement, iNaturalist
        sched='step', decay_epochs=30, decay_rate=0.1,  # supplement
        train_crop='random', color_jitter=None),  # supplement: resized, then crops and flips
    'coco_resnet101': Recipe(
        epochs=30, batch_size=16, opt='momentum', momentum=0.9, lr=0.01, weight_decay=1e-4,  # supplement, MS-COCO
        sched='step', decay_epochs=5, decay_rate=0.1, freeze_epochs=2,  # supplement
        img_size=448, train_crop='squash', crop_mode='squash', crop_pct=1.),  # supplement: resized and flipped
    'coco_vit_large': Recipe(
        epochs=80, batch_size=128, opt='adam', lr=1e-4, weight_decay=0.01, sched='onecycle',  # supplement, MS-COCO
        model_ema_decay=0.9997, aa='rand-m9-mstd0.5-inc1',  # supplement; timm's RandAugment at its usual strength
        loss='asl',  # the experiments that the paper follows
        img_size=448, train_crop='squash', crop_mode='squash', crop_pct=1.),  # supplement
    'reid': Recipe(
        epochs=350, batch_size=64, opt='momentum', momentum=0.9, lr=0.065, weight_decay=1e-4,  # supplement, Market-1501
        sched='multistep', decay_milestones=(150, 225, 300), decay_rate=0.1,  # supplement, from-scratch training
        train_crop='squash'),
    'reid_finetune': Recipe(
        epochs=150, batch_size=64, opt='adam', amsgrad=True, lr=3e-4, weight_decay=1e-4,  # supplement, Market-1501
        sched='step', decay_epochs=60, decay_rate=0.1,  # supplement, fine-tuning
        train_crop='squash'),
    'finetune': Recipe(  # not the paper's
        epochs=15, epoch_updates=20, batch_size=64, opt='adamw', lr=1e-4, head_lr_factor=10., weight_decay=0.05,
        freeze_bn=True, clip_grad=1., sched='cosine', sched_on_updates=True, warmup_epochs=1, warmup_lr=1e-6,
        min_lr=1e-6, scale=(0.35, 1.), mixed_precision='auto')}
_VIT_REMARK = (
    'The paper prints the learning rate before it is scaled by batch size / 512, and lets it end at zero. The released '
    'command ends at 1e-05, asks for ten cool-down epochs that it never reaches, and applies every learning rate one '
    'epoch late; this delay is left out here.')
_MLP_REMARK = (
    'The paper lets the learning rate end at zero and names random erasing; the released settings end at 1e-05 and do '
    'without it.')
REMARKS: Dict[str, str] = {  # where paper and released command disagree, the command wins
    'deit': f'{_VIT_REMARK} The released command keeps averaged weights, and evaluates the plain '
            'ones; here the averaged ones are evaluated.',
    'pvt': _VIT_REMARK,
    'mixer': _MLP_REMARK,
    'gmlp': _MLP_REMARK,
    'aggressive':
        'ResNet50 of Table XVI, trained with the defaults of the public ConvNeXt code. LayerScale is left out: '
        "timm's ResNet has none. The paper names stochastic depth, ConvNeXt's default rate is 0, and so it is here; "
        "see --drop-path. ConvNeXt's cosine begins after the warm-up, timm's counts it: the learning rate is lower by "
        'up to 6 % of its peak.'}


def learning_rate(recipe: Recipe) -> Tuple[float, str]:
    """The highest learning rate of a recipe or a run, and where it comes from: '0.001 = 0.0005 x 1024 / 512'."""
    if recipe.lr is not None:
        return recipe.lr, f'{recipe.lr:g}'
    lr = recipe.lr_base * recipe.batch_size / recipe.lr_base_size
    return lr, f'{lr:g} = {recipe.lr_base:g} x {recipe.batch_size} / {recipe.lr_base_size}'


def recipe_of(model: str) -> Optional[str]:
    """The recipe's name of a NOAH model or of a vanilla twin of the catalog, with or without tag; None for others."""
    row = find_row(model.partition('.')[0])
    return row and FAMILIES[row.family].recipe
