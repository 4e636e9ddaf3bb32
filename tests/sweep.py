"""The head on one model of every module of timm, the smallest; and on every name of timm, on the meta device.

    python -m tests.sweep          # writes docs/backbones.md, in about an hour
    pytest -m slow tests/models/test_attach.py

Both run `check` and `try_on_meta`; the test compares what they give with the table.
"""
import collections
import copy
import pickle
import sys
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config

import noah_zoo
from noah_zoo import NoahHead, add_noah_head

TABLE = Path(__file__).resolve().parents[1] / 'docs' / 'backbones.md'
TEXT = """# The head on timm's models

[`noah_zoo.add_noah_head(model)`](your_backbone.md) puts the head on a timm model. Tried here: timm {timm}.

- Class and register tokens are left out of the positions.
- What timm does between pooling and classifier (a norm, a 1x1 layer, the MLP of an attention pool, dropout) is done per
  position. *Channels* are those of the features, and after an arrow what is left of them for the head.
- Of two heads, NOAH takes the place of the first and the second goes: a distilled model's for the teacher, VOLO's
  auxiliary one.
- N and r are the defaults.

A model that cannot take the head is refused, with the reason, and is as it was.

## One model of every module, the smallest

{accepted} of {modules} take the head, and pass forward, backward with a gradient everywhere, reset, `pre_logits`,
deepcopy and state-dict round trip.

{table}

## Every name

Built on the meta device (with real weights, where a model looks at values), {accepted_names:,} of {names:,} names take
the head. The others:

{refused}

`python -m tests.sweep` writes this page, `pytest -m slow tests/models/test_attach.py` checks it.
"""


def modules():
    """timm's own modules, without those of this package."""
    own = {file.stem for file in Path(noah_zoo.__file__).with_name('models').glob('*.py')}
    return [name for name in timm.list_modules() if name not in own]


def try_on_meta(name):
    """Parameters of a model, and why it cannot take the head: '' if it can."""
    with torch.device('meta'):
        model = timm.create_model(name)
    params = sum(p.numel() for p in model.parameters())
    try:
        add_noah_head(model, num_classes=10)
    except ValueError as error:
        reason = str(error).removeprefix(f'{name}: ')
        if 'meta tensors' not in reason:
            return params, reason
        model = add_noah_head(timm.create_model(name), num_classes=10)  # it looks at values
    assert isinstance(model.get_classifier(), NoahHead)
    return params, ''


def image(model, batch=2):
    """Random images: of a size that timm calls the smallest, or of 256 pixels, if the model takes more than its own."""
    cfg = model.pretrained_cfg
    channels, *size = resolve_data_config({}, model=model)['input_size']
    if not cfg.get('fixed_input_size'):
        size = (cfg.get('min_input_size') or (channels, *(min(side, 256) for side in size)))[1:]
    return torch.randn(batch, channels, *size)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def check(name, **kwargs):
    """Put the head on a model and ask of it what timm asks of its own; return the model's cells of the table.

    Raises:
        AssertionError: If it falls short.
        ValueError: If the model is refused; that it is as it was has been checked.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    x = image(model)
    timm_cls = type(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        added = add_noah_head(model)
    except ValueError:
        assert type(model) is timm_cls and not hasattr(model, 'noah_cfg')
        assert not any(module.training for module in model.modules())
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in after)
        raise
    assert added is model and isinstance(model, timm_cls)
    assert not any(module.training for module in model.modules())
    head, place = model.get_classifier(), f'{model.noah_place}.'
    heads = place, 'head_dist.', 'aux_head.'
    assert isinstance(head, NoahHead) and model.num_classes == head.num_classes == 10

    # The backbone's weights and names are the twin's; so timm's weights load, but for the head.
    backbone = {key: value for key, value in model.state_dict().items() if not key.startswith(place)}
    assert set(before) - set(backbone) <= {key for key in before if key.startswith(heads)}
    assert all(torch.equal(value, before[key]) for key, value in backbone.items())
    result = model.load_state_dict(before, strict=False)
    assert result.missing_keys and all(key.startswith(place) for key in result.missing_keys)
    assert all(key.startswith(heads) for key in result.unexpected_keys)

    model.train()
    model(x).square().mean().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before, strict=False)  # batch statistics too
    model.eval()

    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert logits.shape == (2, 10) and logits.isfinite().all()
        close(model.forward_head(features), logits)
        pooled = model.forward_head(features, pre_logits=True)
        twin = timm.create_model(name, num_classes=10, **kwargs).eval()
        twin.load_state_dict(before)
        close(twin.forward_features(x), features)
        close(twin.forward_head(features, pre_logits=True), pooled)
        del twin
        assert type(pickle.loads(pickle.dumps(model))) is type(model)
        clone = copy.deepcopy(model)
        assert type(clone) is type(model)
        for value in clone.parameters():
            value.zero_()
        clone.load_state_dict(model.state_dict())
        close(clone(x), logits)
        del clone
        model.reset_classifier(0)
        close(model(x), pooled)
        model.reset_classifier(5)
        again = model.get_classifier()
        assert model(x).shape == (2, 5) and model.num_classes == 5
        assert (again.num_groups, again.key_ratio) == (head.num_groups, head.key_ratio)

    fmt, num_prefix_tokens, width = model.noah_features
    channels = str(width) if width == head.in_features else f'{width} → {head.in_features}'
    return [f'`{model.noah_place}`', fmt, str(num_prefix_tokens or ''), channels, str(head.num_groups),
            f'{head.key_ratio:.4g}']


def row(module, name, params, cells):
    return '| ' + ' | '.join([module, f'`{name}`', f'{params / 1e6:.1f}', *cells]) + ' |'


def smallest(params):
    """The smallest model of every module."""
    return {module: min(timm.list_models(module=module), key=lambda name: params[name]) for module in modules()}


def cells_of(name):
    try:
        return check(name)
    except ValueError as error:
        return ['refused: ' + str(error).removeprefix(f'{name}: '), '', '', '', '', '']


def write(rows, accepted, reasons, num_names):
    """Write the page: rows of the table, names that take the head, and names by the reason why they do not."""
    header = ['| module | model | parameters, M | place | features | tokens left out | channels | N | r |',
              '|' + ' --- |' * 9]
    TABLE.write_text(TEXT.format(
        timm=timm.__version__, accepted=sum('refused' not in line for line in rows), modules=len(rows),
        table='\n'.join(header + rows), accepted_names=len(accepted), names=num_names,
        refused='\n'.join(
            f'- {reason}: {", ".join(f"`{name}`" for name in names)}' for reason, names in sorted(reasons.items())),
    ), encoding='utf-8')


def main():
    params, reasons = {}, collections.defaultdict(list)
    for name in (name for module in modules() for name in timm.list_models(module=module)):
        params[name], reason = try_on_meta(name)
        reasons[reason].append(name)
        print(name, reason or 'ok', file=sys.stderr, flush=True)
    rows = []
    for module, name in smallest(params).items():
        rows.append(row(module, name, params[name], cells_of(name)))
        print(rows[-1], file=sys.stderr, flush=True)
    write(rows, reasons.pop(''), reasons, len(params))


if __name__ == '__main__':
    main()
