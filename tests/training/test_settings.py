"""Recipes: their figures, what timm makes of them, and how flags become the settings of a run."""
import dataclasses
import logging
import math
from pathlib import Path

import pytest
import timm
import torch

import noah_zoo  # noqa: F401  registers the models
from noah_zoo.catalog import CATALOG, released
from noah_zoo.cli import main
from noah_zoo.cli.train import parse_args
from noah_zoo.config import TrainConfig
from noah_zoo.recipes import RECIPES, REMARKS, Recipe, recipe_of
from noah_zoo.training import train
from noah_zoo.training.builders import build_optimizer, build_scheduler
from noah_zoo.training.run_folder import RunFolder
from noah_zoo.training.settings import SCHEDULES, BatchPlan, configure, learning_rate, plan_batch

from ..commands import call

SMALL = {  # a model of every optimizer setting
    'resnet': 'resnet18_noah', 'mobilenet': 'mobilenetv2_035_noah', 'shufflenet': 'shufflenetv2_100_noah',
    'deit': 'deit_tiny_050_patch16_224_noah', 'pvt': 'pvt_tiny_050_noah', 'mixer': 'mixer_s16_050_224_noah',
    'gmlp': 'gmlp_ti16_050_224_noah'}


def parse(*words):
    """What scripts/train.py makes of its flags."""
    return configure(**vars(parse_args(['--output', 'out', *words], 'noah-zoo train')[1]))


# The figures


@pytest.mark.parametrize('name, epochs, batch_size, lr, weight_decay', [  # the paper's supplement, commands' scaling
    ('resnet', 100, 256, 0.1, 1e-4), ('mobilenet', 150, 256, 0.05, 4e-5), ('shufflenet', 240, 1024, 0.5, 4e-5),
    ('deit', 300, 1024, 5e-4 * 1024 / 512, 0.05), ('pvt', 300, 1024, 5e-4 * 1024 / 512, 0.05),
    ('mixer', 300, 1536, 7e-4, 0.067), ('gmlp', 300, 1536, 7e-4, 0.067), ('aggressive', 300, 4096, 4e-3, 0.05)])
def test_figures_of_the_supplement(name, epochs, batch_size, lr, weight_decay):
    recipe = RECIPES[name]
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (epochs, batch_size, weight_decay)
    assert learning_rate(recipe)[0] == lr
    named = name in ('deit', 'pvt', 'aggressive')  # the regularization that the supplement names
    assert all((recipe.smoothing, recipe.aa, recipe.mixup, recipe.cutmix)) == (named or name in ('mixer', 'gmlp'))
    assert bool(recipe.reprob) == named  # the released MLP settings erase nothing, and the remark says so
    assert ('random erasing' in REMARKS.get(name, '')) == (name in ('mixer', 'gmlp'))
    assert set(REMARKS) <= set(RECIPES)


def test_figures_of_the_supplement_downstream():
    inat, resnet, vit = (RECIPES[name] for name in ('inaturalist', 'coco_resnet101', 'coco_vit_large'))
    assert [(r.epochs, r.batch_size, r.lr, r.weight_decay) for r in (inat, resnet, vit)] == [
        (100, 256, 0.1, 1e-4), (30, 16, 0.01, 1e-4), (80, 128, 1e-4, 0.01)]
    assert (resnet.sched, resnet.decay_epochs, resnet.freeze_epochs) == ('step', 5, 2)
    assert (vit.opt, vit.sched, vit.model_ema_decay) == ('adam', 'onecycle', 0.9997) and vit.aa.startswith('rand-')
    assert not any((resnet.aa, resnet.color_jitter, resnet.reprob, resnet.mixup, inat.aa, inat.mixup))
    assert resnet.img_size == vit.img_size == 448 and resnet.train_crop == vit.train_crop == 'squash'


def released_lr(name, epoch, progress):
    """The learning rate of the released code, or of ConvNeXt; `progress` is the share of the epoch that is done."""
    if name in ('resnet', 'inaturalist'):
        return 0.1 * 0.1 ** sum(s <= epoch for s in (30, 60, 90))
    if name == 'coco_resnet101':
        return 0.01 * 0.1 ** (epoch // 5)
    if name == 'mobilenet':
        return 0.05 * (1 + math.cos(math.pi * epoch / 150)) / 2
    if name == 'shufflenet':
        return 0.5 * (1 - epoch / 240)
    peak, warmup = {'deit': (1e-3, 5), 'pvt': (1e-3, 5), 'mixer': (7e-4, 20), 'gmlp': (7e-4, 20)}.get(name, (4e-3, 20))
    if name == 'aggressive':
        t = epoch + progress
        return peak * t / 20 if t < 20 else 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (t - 20) / 280)) / 2
    if epoch < warmup:
        return 1e-6 + (peak - 1e-6) * epoch / warmup
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2


@pytest.mark.parametrize('name', [*SMALL, 'aggressive', 'inaturalist', 'coco_resnet101'])
def test_learning_rate_over_the_epochs(name):
    recipe, updates, epochs = RECIPES[name], 8, RECIPES[name].epochs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.randn(2))], learning_rate(recipe)[0])
    scheduler = build_scheduler(optimizer, TrainConfig(model='', output='', **vars(recipe)), updates)
    if hasattr(scheduler, 'get_cycle_length'):  # no cool-down
        assert scheduler.get_cycle_length() == epochs * (updates if recipe.sched_on_updates else 1)
    peak, farthest = learning_rate(recipe)[0], 0.
    for update in range(0, epochs * updates):
        if recipe.sched_on_updates:
            scheduler.step_update(update)
        elif update % updates == 0:
            scheduler.step(update // updates)
        lr, expected = optimizer.param_groups[0]['lr'], released_lr(name, update // updates, update % updates / updates)
        farthest = max(farthest, abs(lr - expected) / peak)
    if name == 'aggressive':
        assert 0.055 < farthest < 0.065 and 'up to 6 %' in REMARKS[name]
    else:
        assert farthest < 1e-12


@pytest.mark.parametrize('family', SMALL)
def test_which_parameters_are_decayed(family):
    recipe, name = RECIPES[family], SMALL[family]
    for name in (SMALL[family], CATALOG[SMALL[family]].vanilla):
        model = timm.create_model(name, num_classes=8)
        optimizer = build_optimizer(model, TrainConfig(model='', output='', **vars(recipe)), 1.)
        names = {id(p): n for n, p in model.named_parameters()}
        decayed = {names[id(p)] for g in optimizer.param_groups if g['weight_decay'] for p in g['params']}
        assert {g['weight_decay'] for g in optimizer.param_groups} <= {0., recipe.weight_decay}
        expected = {
            n for n, p in model.named_parameters() if family in ('resnet', 'mobilenet') or p.ndim > 1
            and not n.endswith(('.bias', 'cls_token') + ('pos_embed',) * (family == 'deit'))}
        assert decayed == expected
        assert type(optimizer).__name__ == {'momentum': 'SGD', 'adamw': 'AdamW'}[recipe.opt]
        assert not optimizer.defaults.get('nesterov') and optimizer.defaults.get('betas') in (None, (0.9, 0.999))
        assert optimizer.defaults.get('momentum', 0.9) == 0.9
    if family in ('shufflenet', 'pvt', 'mixer'):
        assert 0 < len(decayed) < len(names)


@pytest.mark.parametrize('family', SMALL)
def test_models_take_the_recipe(family):
    recipe, row = RECIPES[family], CATALOG[SMALL[family]]
    authors = timm.get_pretrained_cfg(f'{row.name}.osvai_in1k')
    assert (recipe.crop_pct, recipe.interpolation) == (authors.crop_pct, authors.interpolation)
    for name in (row.name, row.vanilla):
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.mean, cfg.std) == (authors.mean, authors.std)  # so the recipe need not name them
        drop_path = {} if recipe.drop_path is None else dict(drop_path_rate=recipe.drop_path)
        model = timm.create_model(name, **drop_path, **recipe.model_kwargs)
        rates = {type(m).__name__: getattr(m, 'drop_prob', getattr(m, 'p', 0)) for m in model.modules()}
        assert rates.get('DropPath', 0) == pytest.approx(recipe.drop_path or 0)
        if family in ('mixer', 'gmlp'):
            assert {m.p for m in model.blocks.modules() if isinstance(m, torch.nn.Dropout)} == {0.02333}
        if name == row.name:
            assert model.get_classifier().drop_rate == row.drop_rate  # the head's dropout is the model's own


# From a name to the settings of a run


def test_every_model_of_the_release_has_its_recipe():
    for name in released():
        assert recipe_of(name) == recipe_of(f'{name}.some_tag')
        config = configure(name, 'out')
        assert {f.name: getattr(config, f.name) for f in dataclasses.fields(Recipe)} == vars(RECIPES[recipe_of(name)])
    assert {recipe_of(name) for name in released()} == set(SMALL)
    assert recipe_of('convnext_tiny') is recipe_of('hf-hub:timm/resnet18.a1_in1k') is None


def test_no_recipe(caplog):
    caplog.set_level(logging.INFO)
    assert configure('convnext_tiny', 'out') == TrainConfig(model='convnext_tiny', output='out')
    assert 'convnext_tiny has no recipe; the defaults' in caplog.text
    caplog.clear()
    assert configure('resnet18', 'out', recipe='none') == TrainConfig(model='resnet18', output='out')
    assert not caplog.text
    assert configure('convnext_tiny', 'out', recipe='aggressive').batch_size == 4096
    with pytest.raises(ValueError, match="recipe 'vit' is unknown; choose from auto, none, resnet, .*, aggressive"):
        configure('resnet18', 'out', recipe='vit')
    with pytest.raises(TypeError, match='epoch'):
        configure('resnet18', 'out', epoch=3)


def test_what_the_user_gives_comes_first():
    given = dict(mixup=0., aa=None, model_ema_decay=None, clip_grad=None, epochs=5, scale=(0.5, 1.))
    config = configure('mixer_s16_224_noah', 'out', **given)
    assert {name: getattr(config, name) for name in given} == given
    assert config.cutmix == 1. and config.model_kwargs == dict(proj_drop_rate=0.02333)
    assert configure('resnet18', 'out', decay_norms=False).decay_norms is False
    kwargs = configure('mixer_s16_224', 'out', model_kwargs=dict(drop_rate=0.5)).model_kwargs
    assert kwargs == dict(proj_drop_rate=0.02333, drop_rate=0.5)
    assert configure('mixer_s16_224', 'out', model_kwargs=dict(proj_drop_rate=0)).model_kwargs == dict(proj_drop_rate=0)
    assert configure('mixer_s16_224', 'out', model_kwargs=None).model_kwargs == {}
    assert RECIPES['mixer'].model_kwargs == dict(proj_drop_rate=0.02333)  # untouched


def test_a_run_that_goes_on_keeps_its_passes(tmp_path):
    for begun, given, updates in (({}, dict(epochs=20), 20), (dict(epochs=5), dict(epochs=20), 0),
                                  ({}, dict(epochs=20, epoch_updates=7), 7)):
        config = configure('resnet18', str(tmp_path), 'finetune', resume='auto', **begun)
        RunFolder(str(tmp_path)).begin(config, ['a'], 0, {})
        longer = configure('resnet18', str(tmp_path), 'finetune', resume='auto', **given)
        assert (longer.epochs, longer.epoch_updates) == (20, updates)
        assert configure('resnet18', str(tmp_path), 'finetune', epochs=20).epoch_updates == 0  # not to go on
        (tmp_path / 'args.yaml').unlink()


@pytest.mark.parametrize('sched', ['plateau', 'none', 'cosin'])
def test_schedulers_that_are_none(sched, idx_dir, tmp_path):
    config = configure('resnet18', str(tmp_path), 'none', data_dir=str(idx_dir), sched=sched, cpu=True)
    with pytest.raises(ValueError, match=f"sched='{sched}' is not one of cosine, .*, onecycle"):
        train(config)


@pytest.mark.parametrize('name', ['epoch_updates', 'workers'])
def test_numbers_below_0(name, idx_dir, tmp_path):
    config = configure('resnet18', str(tmp_path), 'none', data_dir=str(idx_dir), cpu=True, **{name: -3})
    with pytest.raises(ValueError, match=f'{name}=-3; expected 0 or more'):
        train(config)


@pytest.mark.parametrize('sched', sorted(set(SCHEDULES) - {'onecycle'}))
def test_every_scheduler_comes_near_the_learning_rate(sched):
    config = TrainConfig(model='', output='', sched=sched, epochs=4, warmup_epochs=1, decay_epochs=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rates = build_scheduler(optimizer, config, 3), []
    for epoch in range(4):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[0] < 1e-3 and 0.08 < max(rates) <= 0.1


def test_recipes_are_not_shared_between_runs():
    configure('mixer_s16_224', 'out').model_kwargs['proj_drop_rate'] = 1
    assert configure('mixer_s16_224', 'out').model_kwargs['proj_drop_rate'] == 0.02333


@pytest.mark.parametrize('model, given, lr, reason', [
    ('deit_tiny_patch16_224', {}, 0.001, '0.001 = 0.0005 x 1024 / 512'),
    ('deit_tiny_patch16_224', dict(batch_size=256), 0.00025, '0.00025 = 0.0005 x 256 / 512'),
    ('deit_tiny_patch16_224', dict(lr=0.01, batch_size=256), 0.01, '0.01'),
    ('resnet18', {}, 0.1, '0.1'),
    ('resnet18', dict(batch_size=64), 0.1, '0.1'),
    ('resnet18', dict(batch_size=64, lr=None), 0.025, '0.025 = 0.1 x 64 / 256'),
    ('resnet18', dict(lr_base=0.2), 0.2, '0.2 = 0.2 x 256 / 256'),
    ('resnet18', dict(lr_base=0.2, lr=0.3), 0.3, '0.3'),
    ('convnext_tiny', {}, 0.05, '0.05 = 0.1 x 128 / 256'),
])
def test_learning_rate_and_its_reason(model, given, lr, reason):
    assert learning_rate(configure(model, 'out', **given)) == (pytest.approx(lr, rel=1e-12), reason)


@pytest.mark.parametrize('batch_size, limit, processes, mixup, plan', [
    (256, None, 1, 0, (256, 1, 1)), (256, None, 8, 0, (32, 1, 8)), (256, 64, 1, 0, (64, 4, 1)),
    (256, 100, 2, 0, (64, 2, 2)), (256, 1000, 2, 0, (128, 1, 2)), (96, 5, 4, 0, (4, 6, 4)), (30, 7, 1, 0, (6, 5, 1)),
    (30, 15, 1, 0, (15, 2, 1)), (30, 15, 1, 0.8, (10, 3, 1)), (4096, 128, 8, 0.8, (128, 4, 8)),
    (7, 3, 1, 0, (1, 7, 1))])
def test_batch_plan(batch_size, limit, processes, mixup, plan):
    config = configure('resnet18', 'out', batch_size=batch_size, device_batch_size=limit, mixup=mixup)
    assert plan_batch(config, processes) == BatchPlan(*plan, batch_size)
    assert plan[0] * plan[1] * plan[2] == batch_size
    assert str(plan_batch(config, processes)) == '{3} = {0} x {1} accumulated x {2} processes'.format(*plan, batch_size)


@pytest.mark.parametrize('given, processes, message', [
    (dict(batch_size=100), 8, 'batch_size=100 .* by 8 processes; the nearest that do: 96 and 104'),
    (dict(batch_size=3), 8, 'batch_size=3 .*; the nearest that do: 8$'),
    (dict(batch_size=36, cutmix=1.), 4, 'by 4 processes x 2, as mixup .*: 32 and 40'),
    (dict(batch_size=0), 1, 'batch_size=0; expected 1 or more'),
    (dict(device_batch_size=0), 1, 'device_batch_size=0; expected 1'),
    (dict(device_batch_size=1, mixup=0.1), 1, 'device_batch_size=1; mixup and CutMix need 2'),
])
def test_batches_that_cannot_be(given, processes, message):
    with pytest.raises(ValueError, match=message):
        plan_batch(configure('resnet18', 'out', **given), processes)


# scripts/train.py


def flags_of(config):
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), '--' + field.name.replace('_', '-')
        if isinstance(value, bool):
            if value:
                yield flag
            elif not flag.startswith('--no-'):
                yield '--no-' + flag[2:]
        elif isinstance(value, dict):
            yield from (flag, *(f'{k}={v}' for k, v in value.items()))
        elif isinstance(value, tuple):
            yield from (flag, *map(str, value))
        else:
            yield from (flag, str(value))


@pytest.mark.parametrize('name', RECIPES)
def test_every_field_is_a_flag(name):
    config = configure(
        'resnet18', 'out', recipe=name, channels_last=True, model_kwargs=dict(a=1, b='x', c=(1, 2)),
        data_dir='none')  # a folder of this name
    assert parse(*flags_of(config), '--recipe', 'none') == config  # also none and --no-...


def test_flags():
    assert parse('--model', 'resnet18_noah') == configure('resnet18_noah', 'out')
    assert parse('--model', 'resnet18_noah', '--smoke').smoke == 3
    config = parse(*(
        '--model mixer_s16_224 -b 64 -j 3 --aa none --clip-grad None --scale 0.5 1 --no-decay-norms --smoke 2 --lr 0.1 '
        '--sync-bn --model-kwargs drop_rate=0.5 name=x=y --model-kwargs flag=False').split())
    assert config == configure(
        'mixer_s16_224', 'out', batch_size=64, workers=3, aa=None, clip_grad=None, scale=(0.5, 1.), decay_norms=False,
        smoke=2, lr=0.1, sync_bn=True, model_kwargs=dict(drop_rate=0.5, name='x=y', flag=False))
    assert config.mixup == 0.5 and config.model_kwargs['proj_drop_rate'] == 0.02333  # the recipe's


def test_the_readmes_command():
    config = parse(*(
        '--model mobilenetv2_035_noah --seed 0 --dataset fashion_mnist --model-kwargs output_stride=16 --img-size 64 '
        '--crop-pct 1.0 --scale 0.8 1.0 --ratio 0.9 1.1 --epochs 6 --batch-size 64 --lr 0.1 --weight-decay 1e-4 '
        '--channels-last --torchcompile --workers 1').split())
    assert (config.opt, config.sched, config.lr, config.weight_decay, config.crop_pct) == (
        'momentum', 'cosine', 0.1, 1e-4, 1.)
    assert config.model_kwargs == dict(output_stride=16) and config.img_size == 64


@pytest.mark.parametrize('words, message', [
    ('--lr abc', "argument --lr: invalid float or 'none' value: 'abc'"),
    ('--epochs none', "argument --epochs: invalid int value: 'none'"),
    ('--model-kwargs x', "argument --model-kwargs: expected KEY=VALUE, not 'x'"),
    ('--model-kwargs =x', "argument --model-kwargs: expected KEY=VALUE, not '=x'"),
    ('--recipe vit', "argument --recipe: invalid choice: 'vit'"),
    ('--scale 1', 'argument --scale: expected 2 arguments'),
    ('--epoch 1', 'unknown flag --epoch; did you mean --epochs'),
    ('--remark x', 'unknown flag --remark; noah-zoo train --help lists all flags'),
    ('--learning-rate=1', 'unknown flag --learning-rate; did you mean --lr?'),
    ('x', 'unrecognized arguments: x'),
])
def test_wrong_flags(words, message, capsys):
    with pytest.raises(SystemExit) as info:
        parse('--model', 'resnet18', *words.split())
    error = capsys.readouterr().err.splitlines()
    assert info.value.code == 2 and len(error) == 2 and error[1].startswith('noah-zoo train: error: ')
    assert message in error[1]


def test_help_is_complete():
    result = call('train', '--help')
    assert result.returncode == 0
    for field in dataclasses.fields(TrainConfig):
        assert f'--{field.name.replace("_", "-")}' in result.stdout
    assert 'accelerate launch -m noah_zoo train --model deit_tiny' in result.stdout
    assert all(f' {name}' in ' '.join(result.stdout.split()) for name in RECIPES)
    assert '--no-no-' not in result.stdout  # which Python 3.14 refuses


@pytest.mark.parametrize('error, code, said', [
    (ValueError('no such model'), 2, 'noah-zoo train: error: no such model\n'),
    (FileNotFoundError(2, 'No such file', 'x'), 2, "noah-zoo train: error: [Errno 2] No such file: 'x'\n"),
    (KeyboardInterrupt(), 130, ' interrupted; with --resume auto it goes on from the newest checkpoint in out\n'),
    (FloatingPointError('loss is nan'), 2, 'noah-zoo train: error: loss is nan\n'),
    (SystemExit(143), 143, ''),
])
def test_exit_codes(error, code, said, monkeypatch, capsys, tmp_path):
    from noah_zoo.training import trainer

    def train(config):
        assert config == configure('resnet18', 'out', epochs=1)
        Path('out').mkdir()
        raise error
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, 'train', train)
    with pytest.raises(SystemExit) as info:
        main(['train', '--model', 'resnet18', '--output', 'out', '--epochs', '1'])
    assert info.value.code == code and capsys.readouterr().err.endswith(said)
