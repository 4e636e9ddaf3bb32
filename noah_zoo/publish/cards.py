"""The model cards of the catalog's models, and the table of models in the documentation."""
import functools
from fractions import Fraction
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

from ..catalog import CATALOG, FAMILIES, NAMESPACE, PUBLISHED, TAG, Pair, drive_id, drive_page, released
from ..files import write
from ..recipes import RECIPES, REMARKS, Recipe, learning_rate, recipe_of
from ..text import table
from ..weights.released import released_model

PAPER = 'https://arxiv.org/abs/2402.02377'
RELEASE = 'https://github.com/OSVAI/NOAH'
BIBTEX = '''\
@misc{li2024noah,
  title = {{NOAH}: Learning Pairwise Object Category Attentions for Image Classification},
  author = {Li, Chao and Zhou, Aojun and Yao, Anbang},
  year = {2024},
  eprint = {2402.02377},
  archivePrefix = {arXiv},
  primaryClass = {cs.CV},
}'''
FIX = 'python scripts/cards.py'
MARKERS = ('<!-- models:begin -->', '<!-- models:end -->')
INSTALL = 'Install `noah_zoo` from a checkout of its repository, `pip install .`, then:'



def is_ours(name: str) -> bool:
    """Whether noah_zoo registers the model, not timm."""
    return model_entrypoint(name).__module__.startswith('noah_zoo.')


# Measures


class _Measures(NamedTuple):
    macs: int
    params: int
    features: Tuple[int, ...]
    pooled: Tuple[int, ...]


@functools.cache
def _measure(name: str) -> _Measures:
    input_size = timm.get_pretrained_cfg(f'{released_model(name).name}.{TAG}').input_size
    with torch.device('meta'), torch.inference_mode():
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            features = model.forward_features(torch.empty(1, *input_size))
            model.forward_head(features)
        pooled = model.forward_head(features, pre_logits=True)
    params = sum(p.numel() for p in model.parameters())
    return _Measures(counter.get_total_flops() // 2, params, tuple(features.shape), tuple(pooled.shape))


def macs(name: str) -> int:
    """Multiply-accumulates of one image, in evaluation, at the input size of the authors' weights.

    Half of what `torch.utils.flop_counter` counts: convolutions and matrix products, attention's too. Nothing is
    computed. A thin DeiT is counted without `pre_logits`.

    Raises:
        ValueError: If the name is not in the catalog.
    """
    return _measure(name).macs


# The catalog's cards


def model_card(name: str, repo_id: Optional[str] = None, sha256: Optional[str] = None) -> ModelCard:
    """The card of the authors' weights of a model.

    Args:
        name: A timm name of the catalog, of a NOAH model or of a vanilla twin, without tag.
        repo_id: The repository on the Hub; by default that of the project, whose published sha256 is then known.
        sha256: Of `model.safetensors`.

    Raises:
        ValueError: If the name is not in the catalog.
    """
    row, is_noah = released_model(name), name in CATALOG
    repo_id = repo_id or f'{NAMESPACE}/{name}.{TAG}'
    if sha256 is None and repo_id in PUBLISHED:
        sha256 = PUBLISHED[repo_id].sha256
    paper = row.paper if is_noah else row.vanilla_paper
    data = ModelCardData(
        model_name=name,
        library_name='timm',
        pipeline_tag='image-classification',
        license='apache-2.0',
        datasets=['imagenet-1k'],
        metrics=['accuracy'],
        tags=['image-classification', 'timm'] + ['noah'] * is_noah,
        eval_results=[
            EvalResult(
                task_type='image-classification', task_name='Image Classification', dataset_type='imagenet-1k',
                dataset_name='ImageNet-1k', dataset_split='validation', metric_type='accuracy', metric_value=value,
                metric_name=f'{label} accuracy (paper, Table {FAMILIES[row.family].table})',
                source_name='NOAH paper', source_url=PAPER)
            for label, value in (('Top-1', paper.top1), ('Top-5', paper.top5))])
    sections = (
        f'# {name}.{TAG}', _introduction(row, is_noah),
        '## Use', _usage(name, repo_id),
        '## Model', _details(row, is_noah),
        '## NOAH and its vanilla twin', _comparison(row),
        '## Training', _training(row, is_noah),
        '## Where the weights come from', _provenance(row, is_noah, sha256),
        '## Limitations', _limitations(),
        '## Citation', f'```bibtex\n{BIBTEX}\n```')
    return make_card(data, sections)


def make_card(data: ModelCardData, sections: Tuple[str, ...]) -> ModelCard:
    body = '\n\n'.join(section for section in sections if section)
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{body}\n')


def _twin_head(row: Pair) -> str:
    return f'{"a class token" if row.family in ("deit", "pvt") else "global average pooling"} and a linear layer'


def _introduction(row: Pair, is_noah: bool) -> str:
    label = FAMILIES[row.family].label
    if is_noah:
        text = (
            f'`{row.name}` is the {label} `{row.vanilla}` for image classification, with NOAH (Non-glObal Attentive '
            f'Head) in place of {_twin_head(row)}. For each of the 1,000 classes and each of {row.num_groups} groups '
            f'of channels, a softmax over the positions of the last feature map weights a map of values; the sum over '
            f'positions and groups is the logit.')
    else:
        text = (
            f'`{row.vanilla}` is the {label} with its usual head, {_twin_head(row)}: the vanilla twin that '
            f'`{row.name}` is compared with in the [NOAH paper]({PAPER}). Its authors trained both with the same '
            f'settings.')
        if is_ours(row.vanilla):
            text += ' timm has no model of this name; noah_zoo adds it.'
        else:
            text += " The model is timm's own; " + (
                'these weights, and their preprocessing, are not those that timm has under this name.'
                if timm.get_pretrained_cfg(row.vanilla).has_weights else 'timm has no default weights for it.')
    return (
        f"{text} The weights (tag `{TAG}`) are the authors', trained on ImageNet-1k, [released]({RELEASE}) under "
        f"Apache-2.0, and converted by noah_zoo to timm's names.")


def _usage(name: str, repo_id: str) -> str:
    ours = is_ours(name)
    measures = _measure(name)
    text = INSTALL
    if not ours:
        text = (
            'timm alone loads this model. The example takes a photograph from `noah_zoo` (`pip install .` in a '
            'checkout of its repository); with an image of yours it does not need that package.')
    by_name = ours and repo_id == f'{NAMESPACE}/{name}.{TAG}'
    return f'{text}\n\n' + snippet(
        f'{name}.{TAG}' if by_name else f'hf-hub:{repo_id}',
        labels=['info = ImageNetInfo()', 'names = [info.index_to_description(i) for i in range(1000)]'],
        imports='ImageNetInfo, create_transform, resolve_model_data_config',
        features=f'  # {measures.features}', pooled='' if _is_thin_deit(name) else f'  # {measures.pooled}')


def snippet(
        location: str, labels: List[str], imports: str, package: bool = True, features: str = '', pooled: str = '',
) -> str:
    """A program that loads a model, prints the best classes of an image and takes its features.

    Args:
        location: What `timm.create_model` takes.
        labels: Lines that give `names`; without any, images are to be compared, not classified.
        imports: Names from `timm.data`.
        package: Import noah_zoo, and take an image from there.
        features: A comment on the features.
        pooled: A comment on the pooled ones.
    """
    lines = ['from pathlib import Path', '', 'import noah_zoo'] if package else []
    lines += ['import timm', 'import torch', 'from PIL import Image', f'from timm.data import {imports}', '']
    if package:
        lines += ["image = Image.open(Path(noah_zoo.__file__).parent / 'samples' / '0008_sandal.png')  # or your own"]
    else:
        lines += ["image = Image.effect_noise((256, 256), 64)  # yours: Image.open('photo.jpg')"]
    lines += [
        f'model = timm.create_model({location!r}, pretrained=True).eval()',
        'transform = create_transform(**resolve_model_data_config(model), is_training=False)',
        "x = transform(image.convert('RGB')).unsqueeze(0)",
        '',
        'with torch.inference_mode():',
        *['    probabilities = model(x)[0].softmax(dim=0)'] * bool(labels),
        f'    features = model.forward_features(x){features}',
        f'    pooled = model.forward_head(features, pre_logits=True){pooled}',
        '']
    lines += [
        *labels,
        'values, indices = probabilities.topk(min(5, len(names)))',
        'for value, index in zip(values.tolist(), indices.tolist()):',
        "    print(f'{value:.4f}  {names[index]}')"] if labels else [
        'embedding = torch.nn.functional.normalize(pooled, dim=1)',
        'print(embedding @ embedding.T)  # of several images: how alike they are, from -1 to 1']
    return '```python\n' + '\n'.join(lines) + '\n```'


def _is_thin_deit(name: str) -> bool:
    """Whether the released code has a layer before the head that the model, as the paper counts it, has not."""
    row = released_model(name)
    return _measure(name).params != (row.params if name in CATALOG else row.vanilla_params)


def _giga(count: int) -> str:
    return f'{count / 1e9:#.3g}'


def numbers(values: Any) -> str:
    return ', '.join(f'{value:g}' for value in values)


def preprocessing(cfg: Dict[str, Any]) -> List[Tuple[str, ...]]:
    """Rows of timm's preprocessing in evaluation."""
    return [
        ('input size', ' x '.join(map(str, cfg['input_size']))), ('crop_pct', f'{cfg["crop_pct"]:g}'),
        ('interpolation', cfg['interpolation']), ('mean', numbers(cfg['mean'])), ('std', numbers(cfg['std']))]


def _details(row: Pair, is_noah: bool) -> str:
    name, params = (row.name, row.params) if is_noah else (row.vanilla, row.vanilla_params)
    paper = row.paper if is_noah else row.vanilla_paper
    measures = _measure(name)
    rows: List[Tuple[str, ...]] = []
    if is_noah:
        rows += [
            ('POCA blocks, N', str(row.num_groups)), ('key ratio, r', str(Fraction(row.key_ratio))),
            ('dropout on the values, in training', f'{row.drop_rate:g}')]
    rows += [('parameters', f'{params:,}'), ('multiply-accumulates, G', _giga(measures.macs))]
    rows += preprocessing(timm.get_pretrained_cfg(f'{row.name}.{TAG}').to_dict())
    notes = 'Multiply-accumulates are those of convolutions and matrix products for one image, counted on this model.'
    if _is_thin_deit(name):
        notes += (
            f' The released code puts a linear layer to 192 channels and a tanh before the head, and the parameters '
            f'above count it. timm.create_model makes it with `pre_logits=True`; without it, the default, the model '
            f'has {measures.params:,} parameters, as the paper counts ({paper.params_m:.2f} M). The converted weights '
            f'have the layer if the released file has it; the multiply-accumulates leave it out.')
    elif abs(paper.params_m - params / 1e6) > 0.0051:
        notes += (
            f' The paper prints {paper.params_m:.2f} M parameters; the released code has {params / 1e6:.2f} M, as has '
            f'this model.')
    return f'{table(("property", "value"), rows)}\n\n{notes}'


def _comparison(row: Pair) -> str:
    number = FAMILIES[row.family].table
    vanilla, noah = row.vanilla_paper, row.paper
    ours, twins = macs(row.name), macs(row.vanilla)
    parameters = 'parameters, with the layer named above' if _is_thin_deit(row.name) else 'parameters'
    rows = [
        (parameters, f'{row.vanilla_params:,}', f'{row.params:,}', f'{row.params - row.vanilla_params:+,}'),
        ('multiply-accumulates, G', _giga(twins), _giga(ours), f'{ours / twins - 1:+.1%}'),
        (f'top-1, % (paper, Table {number})', f'{vanilla.top1:.2f}', f'{noah.top1:.2f}',
         f'{noah.top1 - vanilla.top1:+.2f}'),
        (f'top-5, % (paper, Table {number})', f'{vanilla.top5:.2f}', f'{noah.top5:.2f}',
         f'{noah.top5 - vanilla.top5:+.2f}'),
        ('images/s, GPU (paper, Table XVII)', f'{vanilla.gpu_fps:.2f}', f'{noah.gpu_fps:.2f}',
         f'{noah.gpu_fps / vanilla.gpu_fps - 1:+.1%}'),
        ('images/s, CPU (paper, Table XVII)', f'{vanilla.cpu_fps:.2f}', f'{noah.cpu_fps:.2f}',
         f'{noah.cpu_fps / vanilla.cpu_fps - 1:+.1%}')]
    return (
        f'{table(("", f"`{row.vanilla}`", f"`{row.name}`", "difference"), rows)}\n\n'
        "Accuracy is on the validation set of ImageNet-1k. Accuracy and speed are the paper's; noah_zoo has measured "
        'neither on ImageNet. The GPU is an NVIDIA TITAN X at batch size 200, the CPU one core of an Intel E5-2683 v3 '
        'at batch size 1.')


def _training(row: Pair, is_noah: bool) -> str:
    recipe, remark = RECIPES[recipe_of(row.name)], REMARKS.get(recipe_of(row.name))
    name, head_dropout = (row.name, row.drop_rate) if is_noah else (row.vanilla, 0.)
    thin = '`--model-kwargs pre_logits=True` adds the layer named above. ' if _is_thin_deit(name) else ''
    command = (
        f'accelerate launch -m noah_zoo train --model {name} --dataset folder --data-dir /data/imagenet \\\n'
        f'  --output runs/{name}')
    return (
        f"The authors trained from scratch on ImageNet-1k, with [their own code]({RELEASE}); these weights come from "
        f"there. Their settings, from the paper's supplement and the released commands:\n\n"
        f'{table(("setting", "value"), _settings(recipe, head_dropout, row.family))}\n\n'
        f'{remark + chr(10) * 2 if remark else ""}'
        f'noah_zoo trains the same architecture with these settings. The recipe is chosen by the model; the images lie '
        f'in `/data/imagenet/train` and `/data/imagenet/validation`:\n\n'
        f'```bash\n{command}\n```\n\n'
        f'The batch size is that of all devices together; `--device-batch-size` accumulates it where memory is short. '
        f'{thin}noah_zoo has trained no model on ImageNet.')


def _settings(recipe: Recipe, head_dropout: float, family: str) -> List[Tuple[str, ...]]:
    """The recipe in words."""
    schedule = {
        'step': f'a tenth every {recipe.decay_epochs:g} epochs', 'cosine': f'cosine to {recipe.min_lr:g}, per epoch',
        'poly': f'linear to {recipe.min_lr:g}, per epoch'}[recipe.sched]
    optimizer = {
        'momentum': f'SGD, momentum {recipe.momentum:g}, not Nesterov',
        'adamw': f'AdamW, betas 0.9 and 0.999, epsilon {recipe.opt_eps or 1e-8:g}'}[recipe.opt]
    undecayed = 'norms, biases and position embeddings' if family == 'deit' else 'norms and biases'
    area, aspect = (f'{low:.3g} to {high:.3g}' for low, high in (recipe.scale, recipe.ratio))
    dropout = recipe.model_kwargs.get('proj_drop_rate')
    return _present(
        (True, ('epochs', str(recipe.epochs))),
        (True, ('batch size, all devices', str(recipe.batch_size))),
        (True, ('optimizer', optimizer)),
        (True, ('learning rate', '; '.join(_present(
            (True, learning_rate(recipe)[1].removesuffix(' as given')),
            (recipe.warmup_epochs, f'{recipe.warmup_epochs} epochs of warm-up from {recipe.warmup_lr:g}'),
            (True, schedule))))),
        (True, ('weight decay', f'{recipe.weight_decay:g}, ' + (
            'on all parameters' if recipe.decay_norms else f'not on {undecayed}'))),
        (True, ('augmentation', '; '.join(_present(
            (True, f'random resized crop (area {area}, aspect ratio {aspect}, '
                   f'{recipe.train_interpolation or recipe.interpolation} interpolation)'),
            (True, 'horizontal flip'),
            (recipe.color_jitter and not recipe.aa, f'colour jitter {recipe.color_jitter}'),
            (recipe.aa, f'RandAugment `{recipe.aa}`'),
            (recipe.reprob, f'random erasing {recipe.reprob:g}'),
            (recipe.mixup, f'mixup {recipe.mixup:g} or CutMix {recipe.cutmix:g}, half of the batches each'),
            (recipe.aug_repeats, f'repeated augmentation, {recipe.aug_repeats} times'))))),
        (recipe.smoothing or recipe.drop_path or head_dropout, ('regularization', '; '.join(_present(
            (recipe.smoothing, f'label smoothing {recipe.smoothing:g}'),
            (recipe.drop_path, f'stochastic depth {recipe.drop_path}'),
            (dropout, f"dropout {dropout} in the blocks' MLPs"),
            (head_dropout, f"dropout {head_dropout:g} on the head's values"))))),
        (recipe.clip_grad, ('gradient clipping', f'norm {recipe.clip_grad}')),
        (recipe.model_ema_decay, ('averaged weights', f'decay {recipe.model_ema_decay}')))


def _present(*items: Tuple[Any, Any]) -> List[Any]:
    return [item for condition, item in items if condition]


def _provenance(row: Pair, is_noah: bool, sha256: Optional[str]) -> str:
    name = row.name if is_noah else row.vanilla
    averaged = RECIPES[recipe_of(row.name)].model_ema_decay
    ema = ' `--ema` takes the averaged weights, where the file has them.' if averaged else ''
    known = f'`{sha256}`' if sha256 else 'recorded here when the weights are published'
    return (
        f"The authors' file on Google Drive: [{drive_id(name)}]({drive_page(name)}). Converted with\n\n"
        f'```bash\nnoah-zoo convert FILE --model {name} --output DIR\n```\n\n'
        f'which renames the parameters, checks every shape and value, and changes no number.{ema} '
        f'SHA-256 of `model.safetensors`: {known}.')


def _limitations() -> str:
    return (
        "The figures are the authors' and were not measured again. What noah_zoo has checked is the conversion: the "
        "logits of the authors' code and of this model agree in float64 on substitute weights; whether the released "
        "file reaches the paper's accuracy has not been verified here. The paper gives one figure per model, without "
        'a spread over seeds. The model knows the 1,000 classes of ImageNet-1k and shares the biases of its '
        'photographs and labels; on other images, drawings or sensors, accuracy is unknown until measured. The paper '
        'names dense tasks such as object detection as a limit of NOAH: such a task keeps the backbone and drops the '
        'head.')


# Files


def models_table() -> str:
    """The Markdown table of the 25 pairs. Cells of figures are vanilla → NOAH."""
    def pair(vanilla: str, noah: str) -> str:
        return f'{vanilla}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{noah}'

    def link(name: str) -> str:
        return f'[`{name}`](../model_cards/{name}.md)'

    rows = [
        (link(row.name), link(row.vanilla) + '\N{NO-BREAK SPACE}†' * is_ours(row.vanilla), str(row.num_groups),
         str(Fraction(row.key_ratio)),
         pair(*(f'{_measure(name).params / 1e6:.2f}' for name in (row.vanilla, row.name))),
         pair(_giga(macs(row.vanilla)), _giga(macs(row.name))),
         pair(f'{row.vanilla_paper.top1:.2f}', f'{row.paper.top1:.2f}'),
         pair(f'{row.vanilla_paper.top5:.2f}', f'{row.paper.top5:.2f}'))
        for row in CATALOG.values()]
    return table(
        ('NOAH model', 'vanilla twin', 'N', 'r', 'parameters, M', 'MACs, G', 'top-1, %', 'top-5, %'), rows)


def write_cards(root: Union[str, Path], check: bool = False) -> List[str]:
    """Write `model_cards/NAME.md` of all 50 names, and the table between the markers of `docs/models.md`.

    `model_cards` holds generated files only: a left-over `.md` is removed. Each file is written beside its place
    and renamed. A file that is as it should be is not touched.

    Args:
        root: The repository.
        check: Write nothing.

    Returns:
        What was out of date, a line per file: 'PATH: differs', 'is missing' or 'is left over'.

    Raises:
        FileNotFoundError: If `docs/models.md` is missing.
        ValueError: If it does not have both markers, once and in order.
    """
    root = Path(root)
    page = root / 'docs' / 'models.md'
    if not page.is_file():
        raise FileNotFoundError(f'{page} is missing; expected the root of the repository')
    text = _bytes(page).decode('utf-8')
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f'{page}: expected the markers {begin} and {end}, once and in this order')
    before, after = text[:text.index(begin)], text[text.index(end):]
    wanted = {page: f'{before}{begin}\n{models_table()}\n{after}'}
    folder = root / 'model_cards'
    wanted.update({folder / f'{name}.md': model_card(name).content for name in released()})

    stale = []
    for path, content in wanted.items():
        current = _bytes(path) if path.is_file() else None
        if current != content.encode('utf-8'):
            stale.append(f'{path.relative_to(root).as_posix()}: {"is missing" if current is None else "differs"}')
            if not check:
                write(path, content)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path not in wanted and path.suffix in ('.md', '.partial'):
            stale.append(f'{path.relative_to(root).as_posix()}: is left over')
            if not check:
                path.unlink()
    return stale


def _bytes(path: Path) -> bytes:
    return path.read_bytes().replace(b'\r\n', b'\n')  # git on Windows may have put them there
