"""The benchmark: the other heads against their formulas, the measures on what is known, real runs, refusals."""
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from noah_zoo import NoahHead
from noah_zoo.benchmark import heads, measure
from noah_zoo.benchmark.heads import CNN, HEADS, SHAPES, Case, head_cases, head_parts, head_step, measure_heads
from noah_zoo.benchmark.measure import peak_memory, ratio, saved_bytes, summary, time_in_turn
from noah_zoo.benchmark.pairs import training_step
from noah_zoo.benchmark.report import (
    HEAD_LOOKS,
    draw_head,
    mean_losses,
    mean_ratios,
    table_classes,
    table_costs,
    table_head,
    table_pairs,
)
from noah_zoo.benchmark.run import MEASURES, benchmark
from noah_zoo.benchmark.settings import Run
from noah_zoo.catalog import CATALOG
from noah_zoo.layers.ablations import PocaVariant
from noah_zoo.layers.other_heads import CSRA, EfficientProbing, MLDecoder, SimPool

from ..commands import call, interrupt

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / 'scripts' / 'benchmark.py')]
MB = 10 ** 6
FORMATS = {'NCHW': (3, 6, 2, 4), 'NLC': (3, 8, 6)}


# The other heads


def tokens(x, input_fmt):
    return x.flatten(2).transpose(1, 2) if input_fmt == 'NCHW' else x


@pytest.mark.parametrize('input_fmt', ['NCHW', 'NLC'])
@pytest.mark.parametrize('num_heads', [1, 2, 4])
def test_csra_is_the_paper_s_equations(num_heads, input_fmt):
    # In the paper the features are pooled, per class, and then classified.
    torch.manual_seed(0)
    head = CSRA(6, 5, num_heads=num_heads, lam=0.3, input_fmt=input_fmt).double()
    x = torch.randn(*((3, 6, 2, 4) if input_fmt == 'NCHW' else (3, 8, 6)), dtype=torch.float64)
    m_HKC = head.classifier.weight.view(num_heads, 5, 6)
    temperatures = [1] if num_heads == 1 else [*range(1, num_heads), math.inf]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for image, x_LC in enumerate(tokens(x, input_fmt)):
        for temperature, m_KC in zip(temperatures, m_HKC):
            for k, m_C in enumerate(m_KC):
                scores_L = x_LC @ m_C
                if temperature == math.inf:
                    attended_C = x_LC[scores_L.argmax()]
                else:
                    weights_L = torch.exp(temperature * scores_L) / torch.exp(temperature * scores_L).sum()
                    attended_C = weights_L @ x_LC
                expected[image, k] += m_C @ (x_LC.mean(dim=0) + 0.3 * attended_C)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('input_fmt', ['NCHW', 'NLC'])
def test_ml_decoder_is_attention_then_a_linear_layer_per_query(input_fmt):
    torch.manual_seed(0)
    head = MLDecoder(6, 11, num_queries=4, width=8, num_heads=2, hidden_features=10, input_fmt=input_fmt).double()
    torch.nn.init.normal_(head.bias_K)
    x = torch.randn(*((3, 6, 2, 4) if input_fmt == 'NCHW' else (3, 8, 6)), dtype=torch.float64)
    memory = (tokens(x, input_fmt) @ head.embed.weight.T + head.embed.bias).clamp(min=0)
    wq, wk, wv = head.attention.in_proj_weight.chunk(3)
    bq, bk, bv = head.attention.in_proj_bias.chunk(3)
    q, k, v = head.queries @ wq.T + bq, memory @ wk.T + bk, memory @ wv.T + bv
    attended = []
    for half in (slice(0, 4), slice(4, 8)):
        attn = torch.softmax(q[:, half] @ k[..., half].transpose(1, 2) / 2, dim=-1)  # 2 is the root of the width 4
        attended.append(attn @ v[..., half])
    h = head.queries + head.attention.out_proj(torch.cat(attended, dim=-1))
    h = F.layer_norm(h, (8,))
    h = F.layer_norm(h + head.feed_forward[2](head.feed_forward[0](h).clamp(min=0)), (8,))
    logits = torch.stack([h[:, k // 3] @ head.weight_GDF[k // 3, :, k % 3] for k in range(11)], dim=1) + head.bias_K
    torch.testing.assert_close(head(x), logits, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('num_classes', [37, 130, 1000])
def test_ml_decoder_parameters_order_of_positions_and_gradients(num_classes):
    torch.manual_seed(0)
    head = MLDecoder(192, num_classes)
    queries = min(100, num_classes)
    attention = 4 * (768 * 768 + 768)
    feed_forward = 768 * 2048 + 2048 + 2048 * 768 + 768
    group_linear = queries * 768 * math.ceil(num_classes / queries) + num_classes
    embed, norms = 192 * 768 + 768, 2 * 2 * 768
    assert sum(p.numel() for p in head.parameters()) == embed + attention + norms + feed_forward + group_linear
    x = torch.randn(2, 192, 3, 3, requires_grad=True)
    logits = head(x)
    assert logits.shape == (2, num_classes)
    shuffled = x.flatten(2)[..., torch.randperm(9)].unflatten(-1, (3, 3))
    torch.testing.assert_close(head(shuffled), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(head(x.flip(1)), logits, atol=1e-2)  # channels do matter
    logits.logsumexp(dim=1).sum().backward()
    for name, tensor in [('x', x), *head.named_parameters()]:
        assert tensor.grad.isfinite().all() and tensor.grad.any(), name


def rows_of(x, input_fmt):
    """For each image a list of positions, each a list of channels."""
    return tokens(x, input_fmt).tolist()


def softmax(scores):
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def classify(layer, pooled):
    return [dot(row, pooled) + bias for row, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)]


@pytest.mark.parametrize('input_fmt', FORMATS)
@pytest.mark.parametrize('gamma', [1., 1.25, 2.])
def test_simpool_is_the_paper_s_equations(gamma, input_fmt):
    torch.manual_seed(0)
    head = SimPool(6, 5, gamma=gamma, input_fmt=input_fmt).double()
    torch.nn.init.normal_(head.norm.weight), torch.nn.init.normal_(head.norm.bias)
    x = 2 * torch.randn(*FORMATS[input_fmt], dtype=torch.float64) + 1
    weights, biases = head.norm.weight.tolist(), head.norm.bias.tolist()
    wq, wk = head.query.weight.tolist(), head.key.weight.tolist()
    expected = []
    for positions in rows_of(x, input_fmt):
        normed = []
        for channels in positions:
            mean = sum(channels) / 6
            std = math.sqrt(sum((c - mean) ** 2 for c in channels) / 6 + 1e-6)
            normed.append([(c - mean) / std * w + b for c, w, b in zip(channels, weights, biases, strict=True)])
        average = [sum(column) / len(positions) for column in zip(*positions)]
        query = [dot(row, average) for row in wq]
        attention = softmax([dot(query, [dot(row, key) for row in wk]) / math.sqrt(6) for key in normed])
        least = min(min(channels) for channels in normed)
        pooled = [
            sum(a * (channels[c] - least + 1e-6) ** gamma for a, channels in zip(attention, normed)) ** (1 / gamma)
            for c in range(6)]
        expected.append(classify(head.classifier, pooled))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('input_fmt', FORMATS)
@pytest.mark.parametrize('num_queries, width', [(1, None), (3, None), (2, 4), (4, 12)])
def test_efficient_probing_is_the_paper_s_equations(num_queries, width, input_fmt):
    torch.manual_seed(0)
    head = EfficientProbing(6, 5, num_queries=num_queries, width=width, input_fmt=input_fmt).double()
    torch.nn.init.normal_(head.queries_GC)  # so that the attention is not nearly uniform
    x = torch.randn(*FORMATS[input_fmt], dtype=torch.float64)
    part = (width or 6) // num_queries
    expected = []
    for positions in rows_of(x, input_fmt):
        pooled = []
        for i, query in enumerate(head.queries_GC.tolist()):
            attention = softmax([dot(query, channels) / math.sqrt(6) for channels in positions])
            for row in head.value.weight.tolist()[i * part:(i + 1) * part]:
                pooled.append(sum(a * dot(row, channels) for a, channels in zip(attention, positions)))
        expected.append(classify(head.classifier, pooled))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-12)


def test_efficient_probing_needs_queries_that_divide():
    with pytest.raises(ValueError, match='width=10 is not a multiple of num_queries=4'):
        EfficientProbing(10, 3, num_queries=4)


@pytest.mark.parametrize(
    'case', [*SHAPES[2:3], *(pytest.param(case, marks=pytest.mark.exhaustive) for case in SHAPES if case != SHAPES[2]),
             Case(16, 2, 1 / 4, 9)],
    ids=lambda case: f'{case.in_features}-{case.positions}')
def test_heads_take_every_shape(case):
    x = case.features('cpu', torch.float32)[:2]
    assert x.is_contiguous() and x.numel() == 2 * case.in_features * case.positions
    heads = {name: build(case).eval() for name, build in HEADS.items() if name != 'compiled'}
    heads['plain'].load_state_dict(heads['noah'].state_dict())
    with torch.inference_mode():
        logits = {name: head(x) for name, head in heads.items()}
    assert all(given.shape == (2, 1000) and given.std() > 0 for given in logits.values())
    torch.testing.assert_close(logits['noah'], logits['plain'], rtol=1e-3, atol=1e-3)
    pooled = x.mean(dim=(2, 3) if x.ndim == 4 else 1)
    torch.testing.assert_close(logits['linear'], heads['linear'][1](pooled), rtol=1e-4, atol=1e-4)
    assert type(heads['plain']) is PocaVariant and type(heads['noah']) is NoahHead


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile traces as ever, and calls no compiler."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))


@torch._dynamo.config.patch(recompile_limit=1)
def test_the_compiled_plain_form_at_many_shapes(eager_backend):
    for size in (1, 2, 3):
        case = Case(8, 2, 1 / 2, 4, num_classes=3, batch_size=size, training=True)
        heads = {name: head_parts(name, case, 'cpu', torch.float32) for name in ('plain', 'compiled')}
        torch.testing.assert_close(*(module(x) for module, x, _ in heads.values()), rtol=1e-5, atol=1e-5)


def test_a_compiled_step_is_compiled_before_it_is_timed(eager_backend):
    case = Case(8, 2, 1 / 2, 4, num_classes=3, batch_size=5, training=True)
    step, stats = head_step('compiled', case, 'cpu', torch.bfloat16), torch._dynamo.utils.counters['stats']
    before = stats['unique_graphs']
    step()  # as `time_in_turn` does, first of all
    compiled = stats['unique_graphs']
    step()
    assert before < compiled == stats['unique_graphs']


def test_compiled_on_cuda_only(eager_backend, monkeypatch):
    heads, case = ['noah', 'plain', 'compiled'], Case(8, 2, 1 / 2, 4, batch_size=2, training=True)
    assert [row['head'] for row in measure_heads(Run(['head'], quick=True), [case], heads, False)] == heads[:2]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: free)
    monkeypatch.setattr('noah_zoo.benchmark.heads.head_step', lambda *args: lambda: time.sleep(0.001))
    monkeypatch.setattr('noah_zoo.benchmark.measure.synchronize', lambda device: None)
    run, free = Run(['head'], device='cuda', quick=True), (2 ** 30, 2 ** 30)
    noah, _, compiled = rows = measure_heads(run, [case], heads, False)
    assert compiled['head'] == 'compiled' and compiled['compiled_by_this']['median'] == 1.
    found = f'{noah["compiled_by_this"]["median"]:.3g}'
    header, _, line = table_head(rows).splitlines()[:3]
    assert header.endswith('NOAH, plain form, compiled, ms | plain / NOAH | compiled / NOAH |')
    assert line.endswith(f' | {found} |')
    assert '| ms | plain / this | compiled / this | peak memory' in table_costs(rows)
    free = (0, 2 ** 30)
    assert ['skipped' in row for row in measure_heads(run, [case], heads, False)] == [False, True, True]


# Time


def test_summary_and_ratio():
    assert summary([4., 1., 3., 2., 5.]) == {'median': 3., 'q1': 2., 'q3': 4., 'repeats': 5}
    assert summary([7.]) == {'median': 7., 'q1': 7., 'q3': 7., 'repeats': 1}
    # Repeat by repeat: a machine that is ten times slower in one repeat does not change it.
    assert ratio([2., 20., 2.], [1., 10., 1.]) == {'median': 2., 'q1': 2., 'q3': 2., 'repeats': 3}


def test_steps_take_turns():
    calls, ticks = [], []
    steps = {name: functools.partial(calls.append, name) for name in 'abc'}
    samples = time_in_turn(steps, repeats=8, min_seconds=0., tick=lambda: ticks.append(1))
    assert {name: len(times) for name, times in samples.items()} == {'a': 8, 'b': 8, 'c': 8} and len(ticks) == 8
    turns = [''.join(calls[i:i + 3]) for i in range(3, 27, 3)]  # the first three calls warm up
    assert len(calls) == 27 and {''.join(sorted(turn)) for turn in turns} == {'abc'} and len(set(turns)) > 1


def test_a_sample_has_as_many_calls_as_it_takes():
    calls = []
    samples = time_in_turn(
        {'sleep': lambda: (calls.append(1), time.sleep(0.001))}, repeats=2, min_seconds=0.02)['sleep']
    assert len(calls) >= 1 + 2 and all(0.001 <= seconds for seconds in samples)
    calls.clear()
    time_in_turn({'slow': lambda: (calls.append(1), time.sleep(0.03))}, repeats=2, min_seconds=0.02)
    assert len(calls) == 4  # warm-up, one that is long enough, two samples


# Memory


def test_saved_bytes_of_known_functions():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    assert saved_bytes(lambda: x @ w, [x, w]) == 0
    assert saved_bytes(lambda: x.t()[:5] * x[:, :5].t()[:5, :10], [x, w]) == 0  # views of what is given
    assert saved_bytes(lambda: x @ w, [x]) == 20 * 30 * 4
    assert saved_bytes(lambda: (x @ w).exp(), [x, w]) == 10 * 30 * 4
    assert saved_bytes(lambda: (lambda y: y * y)(x @ w), [x, w]) == 10 * 30 * 4  # one storage, kept twice
    assert saved_bytes(lambda: (lambda y: y[:1] * y[1:2])(x @ w), [x, w]) == 10 * 30 * 4  # all of it stays
    with torch.no_grad():
        assert saved_bytes(lambda: (x @ w).exp(), [x, w]) == 0


def test_saved_bytes_of_the_heads():
    head = PocaVariant(64, 10, 4, 0.5)
    x = torch.randn(3, 64, 5, 5, requires_grad=True)
    maps = 3 * 4 * 10 * 25 * 4  # the softmax and the value
    plain = saved_bytes(lambda: head(x), [x, *head.parameters()])
    assert plain == 2 * maps
    head = NoahHead(64, 10, 4, 0.5)
    assert saved_bytes(lambda: head(x), [x, *head.parameters()]) < 0.1 * plain


@torch.library.custom_op('noah_zoo_tests::needs_200_mb', mutates_args=())
def needs_200_mb(x: torch.Tensor) -> torch.Tensor:
    return torch.full((50 * MB,), 1.).sum() + x


def build_custom_op():
    x = torch.randn(5 * MB)
    return lambda: needs_200_mb(x)  # what it allocates itself is freed when its result, of 20 MB, is made


def build_not_torch():
    return lambda: np.full(100 * MB, 1, np.uint8).sum()


def build_in_place():
    x = torch.randn(50 * MB)
    return lambda: x.add_(1.)


def build_many_small_ones():
    return lambda: [np.full(100_000, 1, np.uint8).sum() for _ in range(2000)]  # one after the other


def build_training():
    weight = torch.randn(4000, 4000, requires_grad=True)
    x = torch.randn(2, 4000)

    def step():
        weight.grad = None
        (x @ weight).square().sum().backward()

    return step


def build_nothing():
    os._exit(3)


@pytest.mark.process
@pytest.mark.parametrize('build, expected', [
    (build_custom_op, 200 * MB), (build_not_torch, 100 * MB), (build_in_place, 0), (build_many_small_ones, 0.1 * MB),
    (build_training, 0)])
def test_peak_memory_of_known_steps(build, expected):
    mine = np.full(400 * MB, 1, np.uint8)  # this process's own memory is not counted
    assert peak_memory(build) == pytest.approx(expected, abs=8 * MB)
    assert mine[-1] == 1


@pytest.mark.process
def test_peak_memory_of_the_plain_form():
    case = Case(64, 4, 1 / 2, 196, num_classes=500, batch_size=16)
    maps = 16 * 4 * 500 * 196 * 4
    assert peak_memory(functools.partial(head_step, 'plain', case, 'cpu', torch.float32)) > 3 * maps  # key, value, both


class Context:
    """In the place of multiprocessing: a child that answers, or one that died."""

    def __init__(self, answers):
        self.answers, self.started = answers, []

    def get_context(self, method):
        assert method == 'forkserver'
        return self

    def set_forkserver_preload(self, names):
        self.preloaded = names

    def Pipe(self, duplex):
        receiver, sender = multiprocessing.Pipe(duplex)
        return receiver, sender

    def Process(self, target, args, daemon):
        sender, build, threads = args
        start = functools.partial(self.child, target, sender, build, threads)
        return SimpleNamespace(start=start, join=lambda: None, exitcode=-9)

    def child(self, target, sender, build, threads):
        self.started.append((build, threads))
        if self.answers:
            target(sender, build, threads)


@pytest.fixture
def unchanged_process(monkeypatch):
    """The settings of a child process that this one is not to get."""
    settings = []
    monkeypatch.setattr(signal, 'signal', lambda *args: settings.append(args))
    monkeypatch.setattr(torch, 'set_num_threads', lambda number: settings.append(number))
    monkeypatch.setattr(
        measure.ctypes, 'CDLL', lambda name: SimpleNamespace(mallopt=lambda *args: settings.append(args)))
    return settings


def test_peak_memory_by_the_answer_of_a_child(monkeypatch, unchanged_process):
    fields = iter([100, 300])
    monkeypatch.setattr(measure, 'kib', lambda file, field: next(fields))
    monkeypatch.setattr(measure, 'multiprocessing', context := Context(answers=True))
    calls = []
    assert peak_memory(functools.partial(lambda: lambda: calls.append(1)), threads=3) == 200 * 1024
    assert len(calls) == 2 and [threads for _, threads in context.started] == [3]
    assert context.preloaded == [__name__]
    assert unchanged_process == [(signal.SIGINT, signal.SIG_IGN), (-3, 1 << 16), 3]


def test_peak_memory_of_a_child_that_was_killed(monkeypatch):
    monkeypatch.setattr(measure, 'multiprocessing', Context(answers=False))
    with pytest.raises(RuntimeError, match='ended with code -9'):
        peak_memory(build_nothing)


@pytest.mark.process
def test_peak_memory_tells_that_the_process_died():
    with pytest.raises(RuntimeError, match='ended with code 3'):
        peak_memory(build_nothing)


# Tables


def test_means():
    def row(head, training, ratio, num_classes=1000):
        case = {'batch_size': 16, 'training': training, 'num_classes': num_classes}
        return {'head': head, 'case': case, 'plain_by_this': {'median': ratio}}

    rows = [
        row('noah', False, 2.), row('linear', False, 100.), row('noah', False, 8.), row('noah', True, 3.),
        row('noah', True, 50., 10)]
    assert mean_ratios(rows) == pytest.approx({'batch 16, forward': 4., 'batch 16, forward + backward': 3.})

    def pair(model, kept, paper):
        stats = {'median': kept, 'q1': kept, 'q3': kept}
        return {
            'model': model, 'batch_size': 1, 'images_per_second': stats, 'vanilla_images_per_second': stats,
            'kept': stats, 'paper_kept': paper, 'lost_by_paper_lost': (1 - kept) / (1 - paper)}

    rows = [pair('a', 0.98, 0.9), pair('b', 0.8, 0.86)]
    assert mean_losses(rows) == {
        'below_paper': ['b'], 'lost': pytest.approx(0.11), 'paper_lost': pytest.approx(0.12)}
    table = table_pairs(rows)
    assert '| a | 1 | 0.98 (0.98–0.98) | 0.98 (0.98–0.98) | 98 (98–98) | 90.0 | 0.20 |' in table
    assert table.endswith("Below the paper's: 1 of 2 (b). Mean loss of speed: 11.0%; the paper's on the same pairs: "
                          '12.0%; 0.92 of it.')


# Real runs


QUICK = {'head': (2 * 3 + 2) * 5, 'classes': 3 * 2 * 3, 'pairs': 1, 'training': 3, 'growth': 2 * 3 * 2}  # rows
COMMAND = [*QUICK, '--quick', '--models', 'mobilenetv2_035', '--output']


def check_quick_run(output, done):
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == sorted(
        f'{name}-cpu-float32.{suffix}' for name in QUICK for suffix in ('json', 'png'))
    for what, num_rows in QUICK.items():
        check_measure(what, num_rows, output, done)


def check_measure(what, num_rows, output, done):
    result = json.loads((output / f'{what}-cpu-float32.json').read_text())
    assert result['what'] == what and result['threads'] == 1 and result['quick'] and result['hardware']
    assert 'noah-zoo benchmark' in result['command'] and result['versions']['torch'] == torch.__version__
    assert len(result['rows']) == num_rows, what
    assert Image.open(output / f'{what}-cpu-float32.png').width > 500
    line, _, *table = done.stdout[done.stdout.index(f'{what} on '):].split('\n')
    assert 'smoke run' in line and table[1].startswith('| --- | --- ') and table[2].startswith('| ')
    for row in result['rows']:
        if what == 'pairs':
            paper, vanilla = CATALOG['mobilenetv2_035_noah'].paper, CATALOG['mobilenetv2_035_noah'].vanilla_paper
            assert row['paper_kept'] == paper.cpu_fps / vanilla.cpu_fps
            assert row['vanilla_images_per_second']['median'] > 0 and row['kept']['repeats'] == 2
            continue
        assert row['seconds']['q1'] <= row['seconds']['median'] <= row['seconds']['q3']
        assert row['case']['input_fmt'] == ('NLC' if row['case']['in_features'] == 192 else 'NCHW')
        assert ('peak_bytes' in row) == (what not in ('head', 'classes'))
        assert ('saved_bytes' in row) == (what in ('training', 'growth') and row['case']['training'])


@pytest.mark.process
def test_a_quick_run_in_a_new_process(tmp_path, monkeypatch):
    monkeypatch.delenv('HF_HUB_DISABLE_PROGRESS_BARS')
    output = tmp_path / 'new' / 'folder'
    done = subprocess.run([*SCRIPT, *COMMAND, str(output)], capture_output=True, text=True, timeout=600)
    check_quick_run(output, done)
    assert 'repeat/s' in done.stderr or 's/repeat' in done.stderr


def replace_models(monkeypatch):
    """Make every model a test_resnet for images of 32 pixels."""
    def create_model(name, **kwargs):
        model = timm_create_model('test_resnet', **kwargs)
        model.pretrained_cfg['input_size'] = (3, 32, 32)
        return model

    timm_create_model = timm.create_model
    monkeypatch.setattr(timm, 'create_model', create_model)


@pytest.fixture(scope='module')
def quick_run(tmp_path_factory):
    """Heads of few channels and positions, small pairs, the memory of this process."""
    output = tmp_path_factory.mktemp('benchmark') / 'new' / 'folder'
    with pytest.MonkeyPatch.context() as monkeypatch:
        few = dict(in_features=16, num_groups=2, positions=4)
        shapes = [dataclasses.replace(shape, **few) for shape in SHAPES]
        shapes[2] = Case(192, 2, 1 / 2, 4, 'NLC')
        monkeypatch.setattr(heads, 'SHAPES', tuple(shapes))
        monkeypatch.setattr(heads, 'CNN', dataclasses.replace(CNN, **few))
        monkeypatch.setattr(heads, 'GROWTH_L', (49, 64))
        replace_models(monkeypatch)
        monkeypatch.setattr(heads, 'peak_memory', lambda build, device, threads: measure._peak(build, device))
        return output, call('benchmark', *COMMAND, output)


def test_quick_run(quick_run):
    check_quick_run(*quick_run)


def test_geometric_mean_is_of_the_rows(quick_run):
    result = json.loads((quick_run[0] / 'head-cpu-float32.json').read_text())
    ratios = [row['plain_by_this']['median'] for row in result['rows'] if row['head'] == 'noah'
              and row['case']['batch_size'] == 1]
    assert result['summary']['batch 1, forward'] == pytest.approx(statistics.geometric_mean(ratios))


def test_least_and_mean_of_classes(quick_run):
    result = json.loads((quick_run[0] / 'classes-cpu-float32.json').read_text())
    steps = {'forward': (False, False), 'forward + backward, cached features': (True, True),
             'forward + backward': (True, False)}
    for step, (training, cached) in steps.items():
        ratios = [
            row['plain_by_this']['median'] for row in result['rows'] if row['head'] == 'noah'
            and (row['case']['training'], row['case']['cached']) == (training, cached)]
        assert len(ratios) == 2 and result['summary']['least'][f'batch 2, {step}'] == min(ratios)
    assert list(result['summary']) == ['least']  # and no mean, as there are no 1,000 classes
    kept = {'q1': 1., 'median': 2., 'q3': 3., 'repeats': 9}
    rows = [
        {'head': 'noah', 'seconds': dict.fromkeys(kept, 0.004 * k), 'plain_by_this': {**kept, 'median': k / 4},
         'case': dataclasses.asdict(dataclasses.replace(shape, num_classes=k, batch_size=32))}
        for shape in SHAPES[:2] for k in (2, 1000)]
    *lines, _, note = table_classes(rows).split('\n')
    assert lines[2:] == [
        '| batch 32, forward | C=1280, L=49, N=8, r=1/4 | NCHW | 0.5 (4,000) | 250 (8) |',
        '| batch 32, forward | C=2048, L=49, N=4, r=1/8 | NCHW | 0.5 (4,000) | 250 (8) |']
    assert note.endswith('The least: batch 32, forward: 0.50. Geometric mean over the shapes at K=1,000: '
                         'batch 32, forward: 250.00.')


def test_cached_features_get_no_gradient():
    case = Case(8, 2, 1 / 2, 4, num_classes=3, batch_size=5, training=True, cached=True)
    module, x, _ = head_parts('noah', case, 'cpu', torch.float32)
    assert not x.requires_grad and module.training
    head_step('noah', case, 'cpu', torch.float32)()


def test_cases_of_head(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for device, large, num_classes in (('cpu', 16, [10, 100]), ('cuda', 200, [10, 100, 21843])):
        cases = head_cases(Run(['head'], device=device))
        assert [(case.batch_size, case.training) for case in cases[:12]] == [
            *[(1, False)] * 4, *[(large, False)] * 4, *[(large, True)] * 4]
        assert {case.num_classes for case in cases[:12]} == {1000}
        assert cases[12:] == [
            dataclasses.replace(CNN, num_classes=k, batch_size=64, training=training)
            for training in (False, True) for k in num_classes]
    assert head_cases(Run(['head'], batch_sizes=[3]))[7].batch_size == 3


def test_picture_of_head():
    stats = {'q1': 1., 'median': 2., 'q3': 3.}
    rows = [{'head': head, 'case': dataclasses.asdict(case), 'seconds': stats}
            for case in head_cases(Run(['head'])) for head in HEADS]
    figure = draw_head(rows)
    assert [axes.get_title() for axes in figure.axes] == [
        f'batch {step}' for step in (
            '1, forward', '16, forward', '16, forward + backward', '64, forward', '64, forward + backward')]
    assert [text.get_text() for text in figure.legends[0].texts] == [HEAD_LOOKS[head][0] for head in HEADS]
    assert [label.get_text().split('\n')[-1] for label in figure.axes[3].get_xticklabels()] == ['K=10', 'K=100']


def test_a_dtype_leaves_the_files_of_another(tmp_path, monkeypatch):
    replace_models(monkeypatch)
    what = ['pairs', 'train_pairs']
    for dtype in ('float32', 'bfloat16'):
        texts = benchmark(what, quick=True, models=['mobilenetv2_035'], dtype=dtype, output=str(tmp_path))
        for name, text in zip(what, texts, strict=True):
            assert f', 1 threads, {dtype}, ' in text and '| mobilenetv2_035_noah | ' in text
            row, = json.loads((tmp_path / f'{name}-cpu-{dtype}.json').read_text())['rows']
            assert row['kept']['median'] > 0 and ('paper_kept' in row) == (name == 'pairs')
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f'{name}-cpu-{dtype}.{suffix}' for name in what for dtype in ('bfloat16', 'float32')
        for suffix in ('json', 'png')]


@pytest.mark.process
def test_busy_processes_are_there_while_it_measures(tmp_path, monkeypatch):
    def busy():
        return [child for child in psutil.Process().children() if 'while os.getppid' in ' '.join(child.cmdline())]

    def look(run):
        deadline = time.monotonic() + 20  # a command that has just begun may have no words yet
        while len(busy()) < 2:
            assert time.monotonic() < deadline
        return measure(run)

    measure = MEASURES['pairs'].measure
    monkeypatch.setitem(MEASURES, 'pairs', MEASURES['pairs']._replace(measure=look))
    text, = benchmark(['pairs'], quick=True, models=['mobilenetv2_035'], busy=2, output=str(tmp_path))
    assert not busy()
    assert ', beside 2 busy processes, ' in text
    assert json.loads((tmp_path / 'pairs-cpu-float32-busy2.json').read_text())['busy'] == 2


def test_a_training_step_of_a_model_trains_it(monkeypatch):
    model = timm.create_model('test_resnet')
    monkeypatch.setattr(timm, 'create_model', lambda name: model)
    first, *_, last = model.parameters()
    before = first.clone(), last.clone()
    step = training_step('test_resnet', 2, 'cpu', torch.float32)
    assert torch.equal(first, before[0]) and torch.equal(last, before[1])
    step()
    assert not torch.equal(first, before[0]) and not torch.equal(last, before[1])
    assert first.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('processes', [0, 2])
def test_busy_processes(processes, tmp_path, monkeypatch):
    replace_models(monkeypatch)
    started, ended = [], []

    class Popen:
        def __init__(self, command, **kwargs):
            started.append(command[-1])

        def kill(self):
            ended.append('kill')

        def wait(self):
            ended.append('wait')

    monkeypatch.setattr('noah_zoo.benchmark.run.subprocess.Popen', Popen)
    text, = benchmark(['pairs'], quick=True, models=['mobilenetv2_035'], busy=processes, output=str(tmp_path))
    assert len(started) == processes and ended == ['kill', 'wait'] * processes
    assert (f', beside {processes} busy processes, ' in text) == (processes > 0)
    assert all(f'os.getppid() == {os.getpid()}' in code for code in started)
    suffix = '-busy2' if processes else ''
    assert json.loads((tmp_path / f'pairs-cpu-float32{suffix}.json').read_text())['busy'] == processes


@pytest.mark.parametrize('error, code, message', [
    (KeyboardInterrupt(), 130, '\nnoah-zoo benchmark: interrupted; what it was measuring is not written\n'),
    (RuntimeError('no memory'), 2, 'noah-zoo benchmark: error: no memory\n')])
def test_a_measure_that_ends_early(error, code, message, tmp_path, monkeypatch):
    def measure(run):
        assert [path.name[:11] for path in tmp_path.iterdir()] == ['.benchmark-']
        assert torch.get_num_threads() == threads + 1
        raise error

    threads = torch.get_num_threads()

    monkeypatch.setitem(MEASURES, 'pairs', MEASURES['pairs']._replace(measure=measure))
    done = call('benchmark', 'pairs', '--threads', threads + 1, '--output', tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, '', message) and not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads


@pytest.mark.process
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv('HF_HUB_DISABLE_PROGRESS_BARS')
    status, stderr = interrupt('benchmark', 'pairs', '--repeats', 1000000, '--output', tmp_path, after=b'repeat')
    assert status == 130, stderr
    assert stderr.decode().splitlines()[-1].startswith('noah-zoo benchmark: interrupted') and b'Traceback' not in stderr
    assert not list(tmp_path.iterdir())


def test_too_large_for_the_plain_form(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr('noah_zoo.benchmark.heads.kib', lambda file, field: 10)
    monkeypatch.setattr('noah_zoo.benchmark.heads.CNN', Case(16, 2, 1 / 2, 4))
    monkeypatch.setattr('noah_zoo.benchmark.heads.peak_memory', lambda *args: 3 * 2 ** 20)
    text, = benchmark(['training'], quick=True, output=str(tmp_path))
    assert '| needs up to 0.0 GiB, 0.0 GiB are free | - | - | - |' in text and 'plain form' in caplog.text
    rows = json.loads((tmp_path / 'training-cpu-float32.json').read_text())['rows']
    assert [('skipped' in row, 'seconds' in row) for row in rows] == [(False, True), (True, False), (False, True)]


# Refusals


@pytest.mark.parametrize('settings, message', [
    (dict(what=['heads']), "what: 'heads' is not one of head, classes, pairs, train_pairs, training, growth, probe"),
    (dict(device='tpu'), "device: 'tpu' is not one of cpu, cuda"),
    (dict(dtype='int8'), "dtype: 'int8' is not one of float32, bfloat16, float16"),
    (dict(models=['resnet50', 'resnet51']), "'resnet51' is not a model of Table XVII; choose from resnet18_noah, "),
    (dict(batch_sizes=[16, 0]), r'batch_sizes=\[16, 0\]: expected 1 or more'),
    (dict(num_classes=[0]), 'num_classes'), (dict(threads=0), 'threads=0: expected'), (dict(repeats=-1), 'repeats=-1'),
    (dict(busy=-1), 'busy=-1')])
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Run(**{'what': ['head'], **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    with pytest.raises(ValueError, match="device='cuda': PyTorch finds no GPU here"):
        next(benchmark(['pairs'], device='cuda'))


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('mine')
    monkeypatch.setattr('noah_zoo.benchmark.run.MEASURES', {'head': None})  # nothing is measured before it is known
    with pytest.raises(OSError, match='file'):
        next(benchmark(['head'], output=str(tmp_path / 'file')))
    assert (tmp_path / 'file').read_text() == 'mine'


def test_a_wrong_argument_is_a_line(tmp_path):
    done = call('benchmark', 'pairs', '--models', 'nope', cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("noah-zoo benchmark: error: 'nope' is not a model") and done.stderr.count('\n') == 1


@pytest.mark.process
def test_help_does_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', *SCRIPT[1:], '--help'], capture_output=True, text=True, check=True)
    assert '    noah-zoo benchmark head pairs training growth --device cpu --threads 1' in done.stdout
    imported = re.findall(r'\| +(\S+)$', done.stderr, re.MULTILINE)
    assert 'argparse' in imported and not {'torch', 'numpy', 'timm'} & set(imported)


def test_the_figures_of_the_documentation():
    head, pairs, training, classes = (
        json.loads((ROOT / 'results' / 'benchmark' / f'{name}-cpu-float32.json').read_text())
        for name in ('head', 'pairs', 'two_threads/training', 'avx512/classes'))
    text = ' '.join((ROOT / 'docs' / 'numbers.md').read_text(encoding='utf-8').replace('\\\n', '').split())
    for result in (head, pairs, training, classes):
        assert result['command'] in text
    least, *mean = classes['summary'].values()
    assert 'least are {:.2f} forward, {:.2f} on cached features and {:.2f} with'.format(*least.values()) in text
    assert 'means at K = 1,000 are {:.2f}, {:.2f} and {:.2f}:'.format(*mean) in text
    assert (
        f'{head["summary"]["batch 1, forward"]:.2f} times as fast as its plain form at batch 1, '
        f'{head["summary"]["batch 16, forward"]:.2f} times at batch 16, '
        f'{head["summary"]["batch 16, forward + backward"]:.2f} times there with backward') in text
    assert f'lose {pairs["summary"]["lost"]:.1%} of the speed' in text
    assert f'{len(pairs["summary"]["below_paper"])} of the 25 lose more' in text
    assert f"paper's lose {pairs['summary']['paper_lost']:.1%}" in text
    noah, plain = (
        next(row for row in training['rows'] if row['head'] == head and row['case']['num_classes'] == 21843)
        for head in ('noah', 'plain'))
    assert noah['case']['batch_size'] == 64 and noah['saved_bytes'] == 0
    assert f'needs {noah["peak_bytes"] / 2**20:.0f} MiB beside' in text
    assert f'the plain form {plain["peak_bytes"] / 2**20:,.0f} MiB' in text
    assert f'{noah["seconds"]["median"]:.1f} s and {plain["seconds"]["median"]:.1f} s' in text
