"""Batches that depend on seed, epoch and position alone."""
import random

import numpy as np
import pytest
import torch

from noah_zoo.data.loader import EpochBatchSampler, EvalBatchSampler, create_loader, seed_everything


def order_of(sampler):
    return [[index for _, _, index in batch] for batch in sampler]


def test_an_epoch_of_few_images_passes_over_them_several_times():
    plain, several = EpochBatchSampler(10, 4, 1, 0, seed=3), EpochBatchSampler(10, 4, 1, 0, seed=3, least=5)
    assert (plain.passes, len(plain), several.passes, len(several)) == (1, 2, 2, 5)
    flat = [index for batch in order_of(several) for index in batch]
    assert flat[:8] == [index for batch in order_of(plain) for index in batch]
    first, second = flat[:10], flat[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [position for batch in several for _, position, _ in batch] == list(range(20))  # augmented anew
    several.start = 3  # it goes on where it was
    assert order_of(several) == order_of(EpochBatchSampler(10, 4, 1, 0, seed=3, least=5))[3:]
    parts = [EpochBatchSampler(10, 2, 2, rank, seed=3, least=5) for rank in (0, 1)]
    assert [a + b for a, b in zip(*map(order_of, parts))] == order_of(EpochBatchSampler(10, 4, 1, 0, seed=3, least=5))
    assert len(EpochBatchSampler(3, 64, 1, 0, seed=0, least=20)) == 20  # fewer images than a batch has
    assert EpochBatchSampler(10_000, 64, 1, 0, seed=0, least=20).passes == 1


def numbers(batches, seed=None, workers=0):
    """What a loader gives of the images 0, 1, ..., each followed by a number that its augmentation draws."""
    loader = create_loader(Numbers(), with_a_draw, batches, workers, 4, seed)
    return [(images[:, 0].tolist(), images[:, 1].tolist(), labels.tolist()) for images, labels in loader]


def with_a_draw(image):
    return torch.cat([image, torch.rand(1)])


class Numbers:
    def __getitem__(self, index):
        return torch.tensor([float(index)]), index


def sampler(processes=1, rank=0, repeats=0, per_device=8):
    return EpochBatchSampler(37, per_device // processes, processes, rank, seed=3, repeats=repeats)


@pytest.mark.parametrize('repeats', [0, 3])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_the_same_global_batch_on_any_number_of_processes(processes, repeats):
    whole = numbers(sampler(repeats=repeats), seed=5)
    assert len(whole) == 37 // 8 and all(len(images) == 8 for images, *_ in whole)
    parts = [numbers(sampler(processes, rank, repeats), seed=5) for rank in range(processes)]
    for step, (images, drawn, labels) in enumerate(whole):
        joined = [sum((part[step][i] for part in parts), []) for i in range(3)]
        assert joined == [images, drawn, labels]  # the augmentation as well
        assert images == labels
    if not repeats:
        assert len({image for images, *_ in whole for image in images}) == 32


def test_a_start_gives_the_tail():
    whole = numbers(sampler(), seed=5)
    for start in range(len(whole) + 1):
        batches = sampler()
        batches.start = start
        assert numbers(batches, seed=5) == whole[start:]


def test_epochs_seeds_and_workers():
    first = numbers(sampler(), seed=5)
    assert numbers(sampler(), seed=5, workers=2) == first
    other = sampler()
    other.epoch = 1
    assert numbers(other, seed=5)[0][0] != first[0][0]
    again = [drawn for _, drawn, _ in numbers(sampler(), seed=6)]
    assert again != [drawn for _, drawn, _ in first]
    torch.manual_seed(1)  # nothing but seed, epoch and position counts
    assert numbers(sampler(), seed=5) == first


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_evaluation_sees_every_image_once(processes):
    parts = [EvalBatchSampler(37, 8, processes, rank) for rank in range(processes)]
    seen = [image for part in parts for images, *_ in numbers(part) for image in images]
    assert sorted(seen) == list(range(37)) and sum(map(len, parts)) == sum(-(-len(p.indices) // 8) for p in parts)


def test_seeds_are_of_all_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(1, 2, 3)
    first = draw()
    seed_everything(1, 2, 4)
    assert all(a != b for a, b in zip(first, draw()))
    seed_everything(1, 2, 3)
    assert draw() == first
