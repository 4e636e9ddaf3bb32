"""Model cards: what they say is the catalog's and the run's, and what they tell to type works."""
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.models import save_for_hf

from noah_zoo.catalog import CATALOG, FAMILIES, released
from noah_zoo.cli.train import parse_args
from noah_zoo.publish import cards
from noah_zoo.publish.cards import macs, model_card, models_table, write_cards
from noah_zoo.publish.run_card import run_card
from noah_zoo.recipes import RECIPES, REMARKS, learning_rate
from noah_zoo.training.settings import configure
from noah_zoo.weights import convert_file

from ..commands import call
from ..released import cheap_state_dict

ROOT = Path(__file__).resolve().parents[2]
ROWS = {name: row for row in CATALOG.values() for name in (row.name, row.vanilla)}
RUN_SUMMARY = ROOT / 'results' / 'fashion_mnist' / 'mobilenetv2_035_noah-seed1' / 'summary.json'
LABELS = ('Bag', 'a | b', 'T-shirt/top')
FEW = tuple(name for row in CATALOG.values() if row.name in (
    'resnet18_noah', 'mobilenetv2_035_noah', 'shufflenetv2_100_noah', 'deit_tiny_050_patch16_224_noah',
    'pvt_tiny_050_noah', 'mixer_s16_050_224_noah', 'gmlp_ti16_050_224_noah') for name in (row.name, row.vanilla))
few_or_all = pytest.mark.parametrize(
    'names', [FEW, pytest.param(tuple(ROWS), marks=pytest.mark.exhaustive)], ids=['a pair of each family', 'all'])


@functools.cache
def card(name):
    return model_card(name)


def figures(name):
    row = ROWS[name]
    return row.paper if name == row.name else row.vanilla_paper


def snippet(text):
    (code,) = re.findall(r'^```python\n(.*?)^```$', text, re.M | re.S)
    return code


def table_rows(text):
    """First cell to the other cells, of all tables."""
    lines = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
    return {line[0]: line[1:] for line in lines}


def parse_training_command(command):
    words = shlex.split(command.replace('\\\n', ' '))
    assert words[:5] == ['accelerate', 'launch', '-m', 'noah_zoo', 'train']
    return parse_args(words[5:], 'noah-zoo train')[1]


# The catalog's cards


@few_or_all
def test_front_matter_survives_the_hub_library(names):
    for name in names:
        text = str(card(name))
        assert text.startswith('---\n') and text.endswith('```\n')
        data = ModelCard(text).data
        assert str(ModelCard(text)) == text and data.to_dict() == card(name).data.to_dict()
        assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'apache-2.0')
        assert data.datasets == ['imagenet-1k'] and data.base_model is None
        assert ('noah' in data.tags) == name.endswith('_noah')
        assert data.model_name == name and len(data.eval_results) == 2
        paper, table = figures(name), FAMILIES[ROWS[name].family].table
        for result, label, value in zip(data.eval_results, ('Top-1', 'Top-5'), (paper.top1, paper.top5)):
            assert result.metric_name == f'{label} accuracy (paper, Table {table})' and result.metric_value == value
            assert (result.metric_type, result.dataset_name, result.dataset_split) == (
                'accuracy', 'ImageNet-1k', 'validation')
            assert result.verified is None and result.source_url == 'https://arxiv.org/abs/2402.02377'


def test_tables_of_the_paper():
    assert Counter(FAMILIES[row.family].table for row in CATALOG.values()) == {'I': 9, 'II': 8, 'III': 8}


@few_or_all
def test_figures_are_the_catalogs(names):
    for name in names:
        row, is_noah, text = ROWS[name], name.endswith('_noah'), card(name).text
        table, head = FAMILIES[row.family].table, text[:text.index('## NOAH and its vanilla twin')]
        own = table_rows(head)
        assert own['parameters'] == [f'{row.params if is_noah else row.vanilla_params:,}']
        assert own['multiply-accumulates, G'] == [f'{macs(name) / 1e9:#.3g}']
        assert ('POCA blocks, N' in own) == is_noah
        if is_noah:
            assert int(own['POCA blocks, N'][0]) == row.num_groups
            assert Fraction(own['key ratio, r'][0]) == Fraction(row.key_ratio)
            assert float(own['dropout on the values, in training'][0]) == row.drop_rate
        cfg = timm.get_pretrained_cfg(f'{row.name}.osvai_in1k')
        assert own['input size'] == ['3 x 224 x 224'] and float(own['crop_pct'][0]) == cfg.crop_pct
        assert own['interpolation'] == [cfg.interpolation]
        for key in ('mean', 'std'):
            assert tuple(float(value) for value in own[key][0].split(', ')) == cfg.to_dict()[key]

        pair = table_rows(text)
        for label, field in (
                (f'top-1, % (paper, Table {table})', 'top1'), (f'top-5, % (paper, Table {table})', 'top5'),
                ('images/s, GPU (paper, Table XVII)', 'gpu_fps'), ('images/s, CPU (paper, Table XVII)', 'cpu_fps')):
            vanilla, noah = getattr(row.vanilla_paper, field), getattr(row.paper, field)
            assert [float(value) for value in pair[label][:2]] == [vanilla, noah]
            if field.startswith('top'):
                assert float(pair[label][2]) == pytest.approx(noah - vanilla, abs=1e-9)
            else:
                assert float(pair[label][2].rstrip('%')) == pytest.approx(100 * (noah / vanilla - 1), abs=0.051)
        file = row.drive_id if is_noah else row.vanilla_drive_id
        assert f'[{file}](https://drive.google.com/file/d/{file}/view)' in text
        assert f'noah-zoo convert FILE --model {name} --output DIR' in text


@few_or_all
def test_where_paper_and_release_count_differently(names):
    assert 'The paper prints 86.86 M parameters; the released code has 86.57 M' in card('deit_base_patch16_224').text
    assert 'The paper prints' not in card('resnet50_noah').text
    assert {name for name in names if 'with `pre_logits=True`; without it' in card(name).text} == {
        f'deit_tiny_{width}_patch16_224{noah}' for width in ('075', '050') for noah in ('', '_noah')} & set(names)
    thin_params = sum(p.numel() for p in timm.create_model('deit_tiny_050_patch16_224_noah').parameters())
    assert 1.535e6 < thin_params < 1.545e6
    assert f'{thin_params:,}' in card('deit_tiny_050_patch16_224_noah').text  # the paper's 1.54M


def test_multiply_accumulates():
    # What torchvision states of the same networks, with three decimals.
    for name, giga in (
            ('resnet50', 4.089), ('resnet18', 1.814), ('mobilenetv2_100', 0.301), ('shufflenetv2_100', 0.145)):
        assert abs(macs(name) / 1e9 - giga) <= 0.0005
    # Instead of one product with C x K, the head has one for each of the L positions.
    for name, channels, positions in (('resnet50_noah', 2048, 49), ('mobilenetv2_035_noah', 1280, 49)):
        assert macs(name) - macs(ROWS[name].vanilla) == 1000 * channels * (positions - 1)


@few_or_all
def test_repository_and_sha256(names):
    assert model_card('resnet18_noah', sha256='ab' * 32).text.count(f'`{"ab" * 32}`') == 1
    assert 'recorded here when the weights are published' in model_card('resnet18_noah', repo_id='me/r18').text
    assert "create_model('resnet18_noah.osvai_in1k'" in card('resnet18_noah').text
    assert "create_model('hf-hub:me/r18'" in model_card('resnet18_noah', repo_id='me/r18').text
    assert "create_model('hf-hub:noah-zoo/resnet18.osvai_in1k'" in card('resnet18').text
    assert 'not those that timm has under this name' in card('resnet18').text
    assert 'timm has no default weights for it' in card('mobilenetv2_035').text
    by_name = [name for name in names if f"create_model('{name}.osvai_in1k'" in card(name).text]
    assert by_name == [name for name in names if cards.is_ours(name)] and 'pvt_tiny_050' in by_name
    assert sum(cards.is_ours(name) for name in ROWS) == 35


def test_published_sha256_is_taken(monkeypatch):
    published = cards.PUBLISHED | {'noah-zoo/resnet18_noah.osvai_in1k': type('P', (), dict(sha256='cd' * 32))}
    monkeypatch.setattr(cards, 'PUBLISHED', published)
    assert 'cd' * 32 in model_card('resnet18_noah').text
    assert 'cd' * 32 not in model_card('resnet18_noah', repo_id='me/r18').text


def test_unknown_name():
    for function in (model_card, macs):
        with pytest.raises(ValueError, match="'resnet50_noa' is not a model .*; choose from resnet50_noah"):
            function('resnet50_noa')


# What a reader types


@few_or_all
def test_snippet_compiles(names):
    for name in names:
        compile(snippet(card(name).text), name, 'exec')


@few_or_all
def test_training_command_is_the_recipe(names):
    for name in names:
        row, recipe = ROWS[name], RECIPES[ROWS[name].family]
        (command,) = re.findall(r'^accelerate launch.*?(?=\n```)', card(name).text, re.M | re.S)
        config = configure(**vars(parse_training_command(command)))
        assert (config.model, config.dataset, config.data_dir) == (name, 'folder', '/data/imagenet')
        assert config.output == f'runs/{name}' and config.crop_pct == timm.get_pretrained_cfg(
            f'{row.name}.osvai_in1k').crop_pct
        assert {key: getattr(config, key) for key in vars(recipe)} == vars(recipe)


@few_or_all
def test_the_recipe_in_words(names):
    for name in names:
        row, family, recipe = ROWS[name], ROWS[name].family, RECIPES[ROWS[name].family]
        dropout = row.drop_rate if name == row.name else 0
        text = card(name).text
        text = text[text.index('## Training'):text.index('## Where')]
        settings = table_rows(text)
        assert int(settings['epochs'][0]) == recipe.epochs
        assert int(settings['batch size, all devices'][0]) == recipe.batch_size
        assert settings['optimizer'][0].startswith({'momentum': 'SGD, momentum 0.9, not', 'adamw': 'AdamW'}[recipe.opt])
        assert re.match(f'{learning_rate(recipe)[0]:g}( =|;)', settings['learning rate'][0])
        assert f'{recipe.weight_decay:g}, ' in settings['weight decay'][0]
        assert ('on all parameters' in settings['weight decay'][0]) == recipe.decay_norms
        for words, said in (
                ("on the head's values", dropout), ('mixup', recipe.mixup), ('RandAugment', recipe.aa),
                ('averaged weights |', recipe.model_ema_decay), ('repeated augmentation', recipe.aug_repeats),
                ('linear to 0', recipe.sched == 'poly'), ('a tenth every 30 epochs', recipe.sched == 'step'),
                ('cosine to', recipe.sched == 'cosine'), ('warm-up from 1e-06', recipe.warmup_epochs),
                ('random erasing 0.25', recipe.reprob), ('label smoothing', recipe.smoothing),
                ('norm 1.0', recipe.clip_grad), ('stochastic depth', recipe.drop_path),
                (f'{recipe.train_interpolation or recipe.interpolation} interpolation', True),
                ("in the blocks' MLPs", recipe.model_kwargs), ('colour jitter', False)):
            assert (words in text) == bool(said), (name, words)
        assert family not in REMARKS or REMARKS[family] in text


def run_snippets(codes, cwd):
    """Run each code, and print the shapes of its features and pooled features after its own output."""
    lines = []
    for code in codes:
        space, output = {}, io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, space)
        lines += output.getvalue().splitlines()
        lines += [f'{tuple(space["features"].shape)} {tuple(space["pooled"].shape)}']
    return lines


def run_snippets_in_a_process(codes, cwd):
    program = '\n'.join(
        f'exec({code!r}, space := {{}}); print(tuple(space["features"].shape), tuple(space["pooled"].shape))'
        for code in codes)
    output = subprocess.run(
        [sys.executable, '-c', program], cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT)})
    assert output.returncode == 0, output.stderr
    return output.stdout.splitlines()


def save_model(folder, channels):
    model = timm.create_model('mobilenetv2_035_noah', num_classes=3, pretrained_cfg_overlay=dict(
        num_classes=3, tag=None, license=None, origin_url=None, input_size=(channels, 64, 64), pool_size=None))
    save_for_hf(
        model, str(folder), safe_serialization=True, model_args={}, model_config=dict(label_names=list(LABELS)))


@functools.cache
def saved_config():
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, 3)
        return (Path(folder) / 'config.json').read_bytes()


def make_run(folder, settings=(), channels=None, **best):
    """A run's folder, as the engine leaves it, of a model with three classes; its weights only with `channels`."""
    (folder / 'best').mkdir(parents=True, exist_ok=True)
    if channels:
        save_model(folder / 'best', channels)
    else:
        (folder / 'best' / 'config.json').write_bytes(saved_config())
    content = json.loads(RUN_SUMMARY.read_text(encoding='utf-8'))
    content['config'].update(settings)
    content['best'] = {key: content[key] for key in ('epoch', 'top1', 'val_loss')}
    content['best'].update(best)
    (folder / 'summary.json').write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize('run_snippets', [
    run_snippets, pytest.param(run_snippets_in_a_process, marks=pytest.mark.docs)])
def test_snippets_run(tmp_path, run_snippets):
    # The twin's weights are a converted file, the run's its own; only the NOAH models are without pretrained weights.
    noah, thin = (
        snippet(card(name).text).replace('pretrained=True', 'pretrained=False')
        for name in ('mobilenetv2_035_noah', 'pvt_tiny_050'))
    torch.save(cheap_state_dict('mobilenetv2_035'), tmp_path / 'released.pth')
    convert_file(tmp_path / 'released.pth', 'mobilenetv2_035', tmp_path / 'twin')
    twin = snippet(card('mobilenetv2_035').text)
    run = snippet(run_card(make_run(tmp_path / 'run', channels=1), 'me/run').text)
    assert "convert('L')" in run and "convert('RGB')" in twin
    assert 'hf-hub:noah-zoo/mobilenetv2_035.osvai_in1k' in twin and 'hf-hub:me/run' in run
    twin = twin.replace('hf-hub:noah-zoo/mobilenetv2_035.osvai_in1k', f'local-dir:{tmp_path / "twin"}')
    run = run.replace('hf-hub:me/run', f'local-dir:{tmp_path / "run" / "best"}')

    lines = run_snippets((noah, thin, twin, run), tmp_path)
    assert len(lines) == 6 + 6 + 6 + 4
    for code, printed in zip((noah, thin, twin), (lines[:6], lines[6:12], lines[12:18])):
        assert all(re.fullmatch(r'[01]\.\d{4}  \S.*', line) for line in printed[:5])
        assert printed[5] == ' '.join(re.findall(r'# (\(.*\))', code))  # the shapes that the comments state
    assert {line.split('  ', 1)[1] for line in lines[18:21]} == set(LABELS)


# A user's own run


def test_run_card(tmp_path):
    made = run_card(make_run(tmp_path, dict(data_dir='/home/me/fashion')), 'me/fashion')
    data = ModelCard(str(made)).data
    assert (data.datasets, data.base_model, data.license) == (['zalando-datasets/fashion_mnist'], None, None)
    (result,) = data.eval_results
    assert result.metric_value == 89.77 and result.dataset_split == 'test'  # what 'validation' is in its IDX files
    assert 'noah' in data.tags and data.model_name == 'fashion'
    rows = table_rows(made.text)
    assert rows['parameters'] == ['409,088'] and rows['key ratio, r'] == ['1/4'] and rows['torch']
    assert '0 Bag\n1 a | b\n2 T-shirt/top' in made.text and '/home/me' not in str(made)

    (command,) = re.findall(r'^accelerate launch.*?(?=\n```)', made.text, re.M | re.S)
    args = parse_training_command(command)
    expected = json.loads(RUN_SUMMARY.read_text(encoding='utf-8'))['config']
    for key, value in expected.items():
        if value not in (None, False, {}) and key != 'data_dir':
            assert getattr(args, key) == value, key
    assert args.data_dir == 'DIR'


def test_run_card_says_what_was_switched_off(tmp_path):
    for given, kept in ((None, None), (False, False), (True, True)):
        made = run_card(make_run(tmp_path / str(given), dict(channels_last=given)), 'me/fashion')
        (command,) = re.findall(r'^accelerate launch.*?(?=\n```)', made.text, re.M | re.S)
        assert getattr(parse_training_command(command), 'channels_last', None) is kept


def test_run_card_of_a_head_on_another_backbone(tmp_path):
    make_run(tmp_path, dict(model='noah', noah_variant='b'))
    model = timm.create_model('noah', backbone='test_vit', num_classes=3, key_ratio=0.25, noah_variant='b')
    save_for_hf(model, str(tmp_path / 'best'), safe_serialization=True)
    made = run_card(tmp_path, 'me/run')
    rows = table_rows(made.text)
    assert '`test_vit` with a NOAH head, trained on Fashion-MNIST' in made.text
    assert 'noah' in ModelCard(str(made)).data.tags
    assert (rows['backbone'], rows['POCA blocks, N'], rows['key ratio, r']) == (['`test_vit`'], ['4'], ['1/4'])
    assert "`noah_variant='b'`" in rows['head'][0]


@pytest.mark.parametrize('head, names', [
    (dict(split_kv=False), ['POCA blocks, N', 'feature split']),
    (dict(split_groups=False), ['POCA blocks, N', 'key ratio, r', 'feature split']),
    (dict(noah_variant='no_split_kv'), ['POCA blocks, N', 'head']),
    (dict(noah_variant='self_attention', num_groups=1), ['head']),
])
def test_run_card_says_no_more_of_the_head_than_it_has(head, names, tmp_path):
    make_run(tmp_path, dict(model='noah'))
    model = timm.create_model('noah', backbone='test_vit', num_classes=3, **head)
    save_for_hf(model, str(tmp_path / 'best'), safe_serialization=True)
    rows = table_rows(run_card(tmp_path, 'me/run').text)
    possible = ('POCA blocks, N', 'key ratio, r', 'feature split', 'head')
    assert [name for name in possible if name in rows] == names


def test_base_model_only_where_it_is_known(tmp_path):
    for settings, base_model in (
            (dict(model='resnet50.a1_in1k', pretrained=True), 'timm/resnet50.a1_in1k'),
            (dict(model='resnet50', pretrained=True), 'timm/resnet50.a1_in1k'),
            (dict(model='hf-hub:me/first@0123', pretrained=True), 'me/first'),
            (dict(model_kwargs=dict(pretrained_backbone='mobilenetv2_050.lamb_in1k')),
             'timm/mobilenetv2_050.lamb_in1k'),
            (dict(model_kwargs=dict(pretrained_backbone='/home/me/secret/twin.safetensors')), None),
            (dict(model_kwargs=dict(pretrained_backbone='local-dir:/home/me/secret/twin')), None),
            (dict(model='resnet50.no_such_tag', pretrained=True), None),
            (dict(model='resnet50.a1_in1k', pretrained=False), None)):
        made = run_card(make_run(tmp_path, settings), 'me/run')
        assert ModelCard(str(made)).data.base_model == base_model, settings
        assert 'secret' not in str(made)


def test_dataset_of_a_run(tmp_path):
    for dataset, ids, kind in (
            ('hfds/ethz/food101', ['ethz/food101'], 'ethz/food101'), ('hfds/me/pets:cats', ['me/pets'], 'me/pets'),
            ('folder', None, 'imagefolder'), ('hfds//home/secret/pets', None, 'imagefolder'),
            ('hfds/C:\\secret\\pets', None, 'imagefolder'), ('hfds/../secret', None, 'imagefolder'),
            ('hfds/imagefolder', None, 'imagefolder'), ('wds/secret/{00..09}.tar', None, 'imagefolder')):
        settings = dict(dataset=dataset, val_split='held_out')
        data = ModelCard(str(run_card(make_run(tmp_path, settings), 'me/run'))).data
        assert data.datasets == ids, dataset
        assert (data.eval_results[0].dataset_type, data.eval_results[0].dataset_split) == (kind, 'held_out')
        settings = dict(dataset=dataset, model_kwargs=dict(
            pretrained_backbone=r'C:\me\secret\weights.pt', channels=[8, 16], files=['/home/secret']))
        text = str(run_card(make_run(tmp_path, settings), 'me/run'))
        assert "'channels=[8, 16]'" in text and 'secret' not in text, dataset


def test_run_without_accuracy(tmp_path):
    made = run_card(make_run(tmp_path, top1=None, val_loss=None), 'me/run')
    assert ModelCard(str(made)).data.eval_results is None and 'no accuracy is recorded' in made.text


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json is missing; expected the folder of a finished run'):
        run_card(tmp_path, 'me/run')
    make_run(tmp_path)
    for text, message in (
            ('{"best"', 'not JSON'), ('[]', "has no 'best'"), ('{"best": {}, "config": {}}', 'no model and dat')):
        (tmp_path / 'summary.json').write_text(text)
        with pytest.raises(ValueError, match=f'summary.json.*{message}'):
            run_card(tmp_path, 'me/run')


# Files


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository whose catalog is FEW."""
    rows = {name: row for name, row in CATALOG.items() if name in FEW}
    monkeypatch.setattr(cards, 'CATALOG', rows)
    monkeypatch.setattr(cards, 'released', lambda: list(FEW))
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'models.md').write_text(f'# Models\n{cards.MARKERS[0]}\n{cards.MARKERS[1]}\nMore.\n')
    (tmp_path / 'model_cards').mkdir()
    for name in FEW:
        shutil.copy(ROOT / 'model_cards' / f'{name}.md', tmp_path / 'model_cards')
    assert write_cards(tmp_path) == ['docs/models.md: differs'], 'python scripts/cards.py'
    return tmp_path


@pytest.mark.exhaustive
def test_the_repository_is_up_to_date():
    assert write_cards(ROOT, check=True) == [], 'python scripts/cards.py'
    assert len(list((ROOT / 'model_cards').iterdir())) == 50 == len(released())


def test_table_of_the_repository(repository):
    page = (ROOT / 'docs' / 'models.md').read_text(encoding='utf-8')
    lines = models_table().splitlines()
    assert len(lines) == 2 + len(FEW) / 2 and all(f'{line}\n' in page for line in lines), 'python scripts/cards.py'
    for line, row in zip(lines[2:], cards.CATALOG.values()):
        check_line(line, row)


@pytest.mark.exhaustive
def test_table():
    lines = models_table().splitlines()
    assert len(lines) == 27 and sum('†' in line for line in lines) == 10
    for line, row in zip(lines[2:], CATALOG.values()):
        check_line(line, row)
    assert '3.29 → 3.30' in next(line for line in lines if 'deit_tiny_075' in line).replace(
        '\N{NO-BREAK SPACE}', ' ')  # as the paper counts


def check_line(line, row):
    cells = line.replace('\N{NO-BREAK SPACE}', ' ').strip('| ').split(' | ')
    assert cells[0] == f'[`{row.name}`](../model_cards/{row.name}.md)'
    assert f'[`{row.vanilla}`]' in cells[1] and ('†' in cells[1]) == cards.is_ours(row.vanilla)
    assert cells[2:4] == [str(row.num_groups), str(Fraction(row.key_ratio))]
    assert cells[5] == ' → '.join(f'{macs(name) / 1e9:#.3g}' for name in (row.vanilla, row.name))
    assert cells[6] == f'{row.vanilla_paper.top1:.2f} → {row.paper.top1:.2f}'
    assert cells[7] == f'{row.vanilla_paper.top5:.2f} → {row.paper.top5:.2f}'


def test_check_finds_what_is_stale_and_writing_mends_it(repository):
    folder, page = repository / 'model_cards', repository / 'docs' / 'models.md'
    right = {path: path.read_bytes() for path in sorted(repository.rglob('*')) if path.is_file()}
    changed = bytearray((folder / 'resnet18.md').read_bytes())
    changed[-100] ^= 1
    (folder / 'resnet18.md').write_bytes(changed)
    (folder / 'pvt_tiny_050.md').unlink()
    (folder / 'resnet19.md').write_text('left over')
    page.write_bytes(page.read_bytes().replace(b'71.81', b'72.81', 1))
    before = {path: path.read_bytes() for path in sorted(repository.rglob('*')) if path.is_file()}
    stale = [
        'docs/models.md: differs', 'model_cards/resnet18.md: differs', 'model_cards/pvt_tiny_050.md: is missing',
        'model_cards/resnet19.md: is left over']
    assert write_cards(repository, check=True) == stale
    assert before == {path: path.read_bytes() for path in sorted(repository.rglob('*')) if path.is_file()}
    assert write_cards(repository) == stale
    assert write_cards(repository, check=True) == write_cards(repository) == []
    assert right == {path: path.read_bytes() for path in sorted(repository.rglob('*')) if path.is_file()}


def test_a_failed_write_leaves_the_file_as_it_was(repository, monkeypatch):
    path = repository / 'model_cards' / 'resnet18.md'
    path.write_text('as it was')

    def fail(*args):
        raise OSError('disk full')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='disk full'):
        write_cards(repository)
    assert path.read_text() == 'as it was' and len(list(path.parent.iterdir())) == len(FEW)


def test_a_page_without_markers_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='models.md is missing'):
        write_cards(tmp_path)
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'models.md').write_text('# Other\n<!-- models:end --><!-- models:begin -->')
    with pytest.raises(ValueError, match='expected the markers'):
        write_cards(tmp_path)
    assert [path.name for path in (tmp_path / 'docs').iterdir()] == ['models.md']


def load_script():
    spec = importlib.util.spec_from_file_location('cards_script', ROOT / 'scripts' / 'cards.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_script(repository):
    def main(*args):
        return call('--root', repository, *args, main=load_script())

    assert main('--check').returncode == 0
    (repository / 'model_cards' / 'gmlp_ti16_050_224.md').unlink()
    done = main('--check')
    assert done.returncode == 1 and 'model_cards/gmlp_ti16_050_224.md: is missing' in done.stderr
    assert 'python scripts/cards.py' in done.stderr
    assert main().returncode == main('--check').returncode == 0
    (repository / 'docs' / 'models.md').unlink()
    done = main()
    assert done.returncode == 2 and 'models.md is missing' in done.stderr


def test_script_help():
    result = call('--help', main=load_script())
    assert result.returncode == 0 and '--check' in result.stdout and 'python scripts/cards.py' in result.stdout
