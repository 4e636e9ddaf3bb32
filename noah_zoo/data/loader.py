"""Batches that depend on seed, epoch and position alone, whoever loads them and wherever a run went on."""
import random
import signal
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

Key = Tuple[int, int, int]  # epoch, position in the epoch, index of the image


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and PyTorch, on every device, with a hash of the numbers."""
    high, low = np.random.SeedSequence(numbers).generate_state(2)
    random.seed(int(high) << 32 | int(low))
    np.random.seed(low)
    torch.manual_seed(int(high) << 32 | int(low))


def outlive_sigterm(worker: int) -> None:
    """For a loader's worker: leave the first SIGTERM, which a scheduler sends to every process, to the run itself."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Transformed(Dataset):
    """Images of a dataset, transformed; an augmentation depends on seed, epoch and position only.

    Args:
        images: A dataset of (image, label).
        transform: From an image to a tensor.
        seed: None if the transform has nothing random.
    """

    def __init__(self, images: Dataset, transform: Callable, seed: Optional[int] = None) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, key: Key) -> Tuple[Tensor, int]:
        epoch, position, index = key
        image, label = self.images[index]
        if self.seed is not None:
            seed_everything(self.seed, epoch, position)
        return self.transform(image), label


class TransformedStream(IterableDataset):
    """As `Transformed`, of images that come one after another; the position is that in this process and worker."""

    def __init__(self, stream: IterableDataset, transform: Callable, seed: Optional[int] = None, rank: int = 0) -> None:
        self.images, self.transform, self.seed, self.rank, self.epoch = stream, transform, seed, rank, 0

    def __iter__(self) -> Iterator[Tuple[Tensor, int]]:
        worker = get_worker_info()
        self.images.set_epoch(self.epoch)
        for position, (image, label) in enumerate(self.images):
            if self.seed is not None:
                seed_everything(self.seed, self.epoch, self.rank, worker.id if worker else 0, position)
            yield self.transform(image), label


class EpochBatchSampler(Sampler):
    """The batches of one process in one epoch, in training: the same images at the same place on any number of them.

    The epoch's order is cut into steps of `per_device` x `processes`, of which each process takes its part; what does
    not fill a step is left out.

    Args:
        count: Number of images.
        per_device: Images in a batch.
        processes: Number of processes.
        rank: Number of this process.
        seed: Random seed of the order.
        repeats: Times that an image comes, one after another (repeated augmentation); the epoch is as long as without.
        least: Batches that an epoch has at least; it passes over the images as often as that takes, each time in
            another order.

    Attributes:
        passes: Times that an epoch passes over the images.
        epoch: The epoch that `iter` gives.
        start: The batch that it begins with.
    """

    def __init__(
            self, count: int, per_device: int, processes: int, rank: int, seed: int, repeats: int = 0, least: int = 0,
    ) -> None:
        self.count, self.per_device, self.processes, self.rank = count, per_device, processes, rank
        self.seed, self.repeats, self.epoch, self.start = seed, max(repeats, 1), 0, 0
        self.passes = max(-(-least * per_device * processes // max(count, 1)), 1)

    def __len__(self) -> int:
        return self.passes * self.count // (self.per_device * self.processes)

    def __iter__(self) -> Iterator[List[Key]]:
        order = [index for number in range(self.passes) for index in self._pass(number)]
        for batch in range(self.start, len(self)):
            first = (batch * self.processes + self.rank) * self.per_device
            yield [(self.epoch, i, order[i]) for i in range(first, first + self.per_device)]

    def _pass(self, number: int) -> List[int]:
        """All images once, in the order of this pass of the epoch."""
        seeds = [self.seed, self.epoch, number] if number else [self.seed, self.epoch]
        order = np.random.Generator(np.random.PCG64(seeds)).permutation(self.count)
        return np.repeat(order[:-(-self.count // self.repeats)], self.repeats)[:self.count].tolist()


class EvalBatchSampler(Sampler):
    """The batches of one process in evaluation: every image once, over all processes.

    Attributes:
        is_padding: Whether there are fewer images than processes and none for this one. Its batch is the first image,
            which the caller must not count.
    """

    def __init__(self, count: int, per_device: int, processes: int, rank: int) -> None:
        self.is_padding = count <= rank
        self.indices, self.per_device = range(0 if self.is_padding else rank, count, processes), per_device

    def __len__(self) -> int:
        return -(-len(self.indices) // self.per_device)

    def __iter__(self) -> Iterator[List[Key]]:
        for first in range(0, len(self.indices), self.per_device):
            yield [(0, i, i) for i in self.indices[first:first + self.per_device]]


def create_loader(
        images: Dataset, transform: Callable, sampler: Optional[Sampler], workers: int, per_device: int,
        seed: Optional[int] = None, rank: int = 0,
) -> DataLoader:
    """A loader of images (B, C, H, W), as the transform gives them, and what the dataset has as their labels, stacked.

    Args:
        images: A dataset, or a stream.
        transform: From an image to a tensor.
        sampler: Batches of keys; None for a stream.
        workers: Loading processes.
        per_device: Images in a batch of a stream.
        seed: Random seed of the transform; None if it has nothing random.
        rank: Number of this process.
    """
    shared: Dict[str, Any] = dict(
        num_workers=workers, pin_memory=torch.cuda.is_available(), worker_init_fn=outlive_sigterm)
    if sampler is None:  # its workers do not stay: they are told the epoch when they start
        images.set_loader_cfg(workers, per_device)
        stream = TransformedStream(images, transform, seed, rank)
        return DataLoader(stream, batch_size=per_device, drop_last=seed is not None, **shared)
    return DataLoader(
        Transformed(images, transform, seed), batch_sampler=sampler, persistent_workers=workers > 0, **shared)


def on_device(
        loader: DataLoader, data_config: Dict[str, Any], device: torch.device, dtype: torch.dtype = torch.float32,
) -> PrefetchLoader:
    """The batches of a loader on a device, where images become floating-point and are normalised; a GPU copies the next
    ones while it computes.

    Args:
        loader: Of uint8 images (B, C, H, W).
        data_config: The model's, with 'mean' and 'std' of values from 0 to 1.
        device: The device.
        dtype: What images become.
    """
    mean, std = data_config['mean'], data_config['std']
    return PrefetchLoader(loader, mean, std, len(mean), device, dtype)
