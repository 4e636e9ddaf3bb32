"""The model card of a user's own training run."""
import json
import re
import shlex
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..catalog import CATALOG
from ..data.hub import FORMATS
from ..data.images import mode_of
from ..layers.ablations import head_class
from ..tasks import Task, find_task
from ..text import table
from ..weights.find import place_on_hub
from ..weights.head_only import Backbone
from .cards import BIBTEX, INSTALL, is_ours, make_card, preprocessing, snippet

_DATASETS = {  # train.py's own names: id on the Hub, name, splits
    'fashion_mnist': ('zalando-datasets/fashion_mnist', 'Fashion-MNIST', {'validation': 'test'})}


def run_card(
        run_dir: Union[str, Path], repo_id: str, backbone: Optional[Backbone] = None, head_bytes: int = 0) -> ModelCard:
    """The card of a model that `noah-zoo train` has trained.

    Nothing is said that the run does not record: no license, no dataset id for a folder, no base model for training
    from scratch or from a local file. Local paths stay out of the card.

    Args:
        run_dir: Folder of a finished run, with `best/config.json` and `summary.json`.
        repo_id: The repository on the Hub.
        backbone: Where the rest is, if the repository has the head alone.
        head_bytes: Size of the weights then.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If one is not what train.py writes.
    """
    run_dir = Path(run_dir)
    config = _read(run_dir / 'best' / 'config.json', 'architecture')
    summary = _read(run_dir / 'summary.json', 'best')
    settings, architecture, best = summary.get('config'), config['architecture'], summary['best']
    if not isinstance(settings, dict) or not {'model', 'dataset'} <= set(settings):
        raise ValueError(f"{run_dir / 'summary.json'}: 'config' has no model and dataset; expected train.py's settings")
    labels = config.get('label_names') or (config.get('pretrained_cfg') or {}).get('label_names') or []
    dataset_id, dataset, split = _dataset(settings)
    model_name = repo_id.split('/')[-1]
    is_noah = architecture in (*CATALOG, 'noah')
    task = find_task(settings.get('task', 'multiclass'))
    results = [
        EvalResult(
            task_type=task.pipeline_tag, task_name=task.title,
            dataset_type=dataset_id or 'imagefolder', dataset_name=dataset, dataset_split=split,
            metric_type=kind, metric_value=best[key], metric_name=label)
        for key, (kind, label) in task.on_card.items() if isinstance(best.get(key), (int, float))]
    data = ModelCardData(
        model_name=model_name if results else None,
        library_name='timm',
        pipeline_tag=task.pipeline_tag,
        base_model=backbone.repo_id if backbone else _base_model(settings),
        **(dict(base_model_relation='adapter') if backbone else {}),
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=[task.pipeline_tag, 'timm'] + ['noah'] * is_noah,
        eval_results=results or None)
    measured = [f'{result.metric_name} {result.metric_value:.2f} %' for result in results]
    measured = measured or ['no accuracy is recorded']
    if isinstance(best.get('val_loss'), (int, float)):
        measured.append(f'cross-entropy {best["val_loss"]:.4f}')
    epochs, seed = settings.get('epochs', '?'), settings.get('seed', '?')
    sections = (
        f'# {model_name}', f'{_title(config)} trained on {dataset} with `noah-zoo train`.',
        '## Use', _run_usage(config, repo_id, bool(labels), task),
        *(('## Only the head', _only_the_head(backbone, head_bytes)) if backbone else ()),
        '## Model', _run_details(config, summary),
        '## Results', f'On the split `{split}` of {dataset}: {"; ".join(measured)}. One run of {epochs} epochs, '
        f'seed {seed}; the weights are those of epoch {best["epoch"]}, the best on this split.',
        '## Training', f'```bash\n{_run_command(settings)}\n```', _run_versions(summary),
        '## Classes', _label_list(labels),
        *(('## Citation', f'```bibtex\n{BIBTEX}\n```') if is_noah else ()))
    return make_card(data, sections)


def _title(config: Dict[str, Any]) -> str:
    backbone = (config.get('model_args') or {}).get('backbone')
    return f'`{backbone}` with a NOAH head,' if backbone else f'`{config["architecture"]}`'


def _run_usage(config: Dict[str, Any], repo_id: str, has_labels: bool, task: Task) -> str:
    architecture = config['architecture']
    channels, *_ = (config.get('pretrained_cfg') or {}).get('input_size', (3,))
    ours = timm.is_model(architecture) and is_ours(architecture)
    names = "model.pretrained_cfg['label_names']" if has_labels else '[str(i) for i in range(model.num_classes)]'
    labels = [f'names = {names}'] if task.pipeline_tag == 'image-classification' else []
    text = snippet(f'hf-hub:{repo_id}', labels, 'create_transform, resolve_model_data_config', package=ours)
    text = text.replace('.softmax(dim=0)', '.sigmoid()') if 'multilabel' in task.notes else text
    text = text.replace("convert('RGB')", f'convert({mode_of(channels)!r})')
    return (f'{INSTALL}\n\n' if ours else '') + text


def _only_the_head(backbone: Backbone, head_bytes: int) -> str:
    rows = [
        ('repository', f'[{backbone.repo_id}](https://huggingface.co/{backbone.repo_id}/tree/{backbone.revision})'),
        ('revision', f'`{backbone.revision}`'), ('file', f'`{backbone.filename}`'), ('sha256', f'`{backbone.sha256}`')]
    return (
        f'The backbone was frozen in training, so `model.safetensors` has the head alone, {head_bytes / 1e3:,.1f} kB. '
        f'noah_zoo takes the backbone from its own repository, as it was, and refuses another:\n\n'
        f'{table(("backbone", ""), rows)}')


def _run_details(config: Dict[str, Any], summary: Dict[str, Any]) -> str:
    architecture, pretrained_cfg = config['architecture'], config.get('pretrained_cfg') or {}
    rows = [('architecture', f'`{architecture}`'), ('classes', str(config.get('num_classes')))]
    head = asdict(CATALOG[architecture]) if architecture in CATALOG else {}
    head.update(config.get('model_args') or {})
    if architecture == 'noah':
        rows.append(('backbone', f'`{head["backbone"]}`'))
    variant = head.get('noah_variant')
    if architecture in (*CATALOG, 'noah') and variant != 'self_attention':
        rows.append(('POCA blocks, N', str(head['num_groups'])))
        splits = {name: head[name] for name in ('split_groups', 'split_kv') if name in head}
        if head_class(variant)(64, 1, **splits).split_kv:
            rows.append(('key ratio, r', str(Fraction(head['key_ratio']).limit_denominator(1000))))
        rows += [('feature split', f'`{name}=False`') for name, split in splits.items() if not split]
    if variant:
        rows.append(('head', f'`noah_variant={variant!r}`, an ablation of the paper'))
    if isinstance(summary.get('params'), int):
        rows.append(('parameters', f'{summary["params"]:,}'))
    if all(pretrained_cfg.get(key) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')):
        rows += preprocessing(pretrained_cfg)
    return table(('property', 'value'), rows)


def _run_versions(summary: Dict[str, Any]) -> str:
    nested = summary.get('versions')
    versions = {**summary, **(nested if isinstance(nested, dict) else {})}
    keys = ('python', 'torch', 'timm', 'accelerate', 'device', 'machine', 'threads')
    rows = [(key, str(versions[key])) for key in keys if versions.get(key) is not None]
    return table(('version', 'value'), rows) if rows else ''


def _read(path: Path, key: str) -> Dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; expected the folder of a finished run of noah-zoo train')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: not JSON: {error}') from None
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f'{path}: has no {key!r}; expected what noah-zoo train writes')
    return content


def _dataset(settings: Dict[str, Any]) -> Tuple[Optional[str], str, str]:
    """Id on the Hub or None, name, and the split that was evaluated."""
    name, split = settings['dataset'], settings.get('val_split') or 'validation'
    if name in _DATASETS:
        dataset_id, label, splits = _DATASETS[name]
        return dataset_id, label, splits.get(split, split)
    prefix, _, rest = name.partition('/')
    if prefix in ('hfds', 'hfids') and _is_on_hub(rest):
        dataset_id = rest.partition(':')[0]
        return dataset_id, dataset_id, split
    is_folder = name in ('folder', 'leaf_folder') or prefix in ('hfds', 'hfids')
    return None, 'a folder of images' if is_folder else prefix, split


def _is_on_hub(dataset: str) -> bool:
    """Whether 'NAME', 'USER/NAME' or such with ':CONFIG' is a dataset of the Hub, not a folder."""
    name = r'[\w-][\w.-]*'
    return bool(re.fullmatch(rf'{name}(/{name})?(:{name})?', dataset)) and not (
        dataset in FORMATS or Path(dataset).exists())


def start_of(settings: Dict[str, Any]) -> Optional[str]:
    """The weights that a run started from, in timm's words or as a path; None for none."""
    pretrained = settings.get('pretrained')
    source = settings['model'] if pretrained is True else pretrained
    return source or (settings.get('model_kwargs') or {}).get('pretrained_backbone')


def _base_model(settings: Dict[str, Any]) -> Optional[str]:
    """Id on the Hub of the weights that a run started from; None for none, or for a local file."""
    source = start_of(settings)
    place = source and place_on_hub(source)
    return place[0] if place else None


def _run_command(settings: Dict[str, Any]) -> str:
    """The command of a run. Local places become names to fill in."""
    places = {'data_dir': 'DIR', 'output': 'OUTPUT'}
    words = []
    for key, value in {**settings, 'output': ''}.items():
        flag = '--' + key.replace('_', '-')
        if key == 'channels_last' and value is False:  # decided by the model unless given
            words.append('--no-channels-last')
        if value is None or value is False or value == {}:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, dict):
            words.append(' '.join([flag, *(shlex.quote(f'{k}={_without_path(v)}') for k, v in value.items())]))
        elif isinstance(value, (list, tuple)):
            words.append(' '.join([flag, *(shlex.quote(_without_path(v)) for v in value)]))
        else:
            words.append(f'{flag} {places.get(key) or shlex.quote(_without_path(value))}')
    lines, line = [], 'accelerate launch -m noah_zoo train --recipe none'
    for word in words:
        if len(line) + len(word) > 110:
            lines.append(line)
            line = ' '
        line += f' {word}'
    return ' \\\n'.join([*lines, line])


def _without_path(value: Any) -> str:
    """A value as it is, but of a path only the name."""
    text = str(value)
    if not isinstance(value, str):
        return '...' if '/' in text or '\\' in text else text
    prefix, slash, rest = text.partition('/')
    if text.startswith(('hf-hub:', 'hf_hub:')) or prefix in ('hfds', 'hfids') and _is_on_hub(rest):
        return text
    if prefix in ('hfds', 'hfids', 'wds') and slash:
        return f'{prefix}/' + ('DIR' if rest else '')
    scheme = 'local-dir:' * text.startswith('local-dir:')
    return scheme + PureWindowsPath(text.removeprefix(scheme)).name


def _label_list(labels: List[str], limit: int = 1000) -> str:
    if not labels:
        return 'The run has no class names.'
    lines = [f'{i} {" ".join(str(label).split())}' for i, label in enumerate(labels[:limit])]
    more = f'\n\nThe other {len(labels) - limit:,} are in `config.json`.' if len(labels) > limit else ''
    return '````text\n' + '\n'.join(lines) + f'\n````{more}'
