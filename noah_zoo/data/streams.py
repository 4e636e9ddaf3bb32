"""Datasets of images that come one after the other."""
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import timm.data
from torch.utils.data import IterableDataset, get_worker_info

from ..text import one_line
from .hub import source_of
from .images import DamagedImageError, read_image

_logger = logging.getLogger(__name__)

INFO = (
    'expected is {"splits": {"train": {"name": "train", "num_samples": 2000, "filenames": ["train-0.tar", '
    '"train-1.tar"], "shard_lengths": [1000, 1000]}}}')


class Stream(IterableDataset):
    """Images that come one after the other: 'hfids/NAME' by timm's reader, and the shards of 'wds/'.

    A process of a distributed run, and each of its workers, reads its own shards: give the loader to no one who deals
    out batches again (Accelerate's `prepare`). In training every worker gives the same number of images, which may mean
    some twice; otherwise each image comes once, however unequal the shards are.

    timm decodes the images of both inside of libraries that lose a damaged image's name, and leaves it out of 'wds/'
    without counting. So its 'hfids/' reader is told not to decode, and its 'wds/' reader's list of shards is read here.

    Attributes:
        class_names: Names in the order of the labels.
        transform: Applied to the image.
        input_img_mode: As of `Images`.
        value_range: As of `Images`.
    """
    task = 'multiclass'
    input_img_mode = 'RGB'
    value_range: Optional[Tuple[float, float]] = None

    def __init__(
            self, name: str, data_dir: Optional[str], split: str, training: bool = False, seed: int = 0,
            skip_damaged: bool = False, input_key: Optional[str] = None, target_key: Optional[str] = None,
    ) -> None:
        self.name, self.split = name, split
        self.training, self.seed, self.skip_damaged = training, seed, skip_damaged
        self.is_wds = name.partition('/')[0].lower() == 'wds'
        self.transform: Optional[Callable] = None
        keys = {'input_key': input_key, 'target_key': target_key}
        options = {key: value for key, value in keys.items() if value}
        options.update(split=split, is_training=training, seed=seed, input_img_mode='')
        self.reader = self._open_shards(data_dir, **options) if self.is_wds else self._open_hub(data_dir, **options)
        self.class_names: Tuple[str, ...] = tuple(self._shard_classes() if self.is_wds else self._hub_classes())
        self._skipped = multiprocessing.Value('q', 0)

    @property
    def skipped(self) -> int:
        """Number of damaged images left out so far, over all workers of this process."""
        return self._skipped.value

    def __len__(self) -> int:
        """Images of this process and epoch, as far as the source tells; in training once `set_loader_cfg` was told."""
        return len(self.reader) if self.training else math.ceil(
            self.reader.num_samples / self.reader.dist_num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; it reaches workers that have started, too."""
        self.reader.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: Optional[int] = None, batch_size: Optional[int] = None) -> None:
        """Tell the number of the loader's workers, and the batch size that the images of each shall be divisible by."""
        self.reader.batch_size = batch_size or self.reader.batch_size
        self.reader.set_loader_cfg(num_workers)

    def __iter__(self) -> Iterator[Tuple[Any, int]]:
        missing = 0
        for image, label in self._read():
            if image is None:
                missing += 1
                with self._skipped.get_lock():
                    self._skipped.value += 1
            else:
                yield image, label
        while self.training and missing:  # the epoch has as many images as was said; some come twice
            before = missing
            for image, label in self._read(logging.DEBUG):
                if image is not None:
                    missing -= 1
                    yield image, label
                if not missing:
                    return
            if missing == before:
                raise ValueError(f'{self.name}[{self.split}]: all images that this process reads are damaged')

    def _read(self, level: int = logging.WARNING) -> Iterator[Tuple[Any, int]]:
        """Images, transformed, and labels as they come; None for a damaged image that is to be left out."""
        for key, data, label in self._shard_samples() if self.is_wds else self._hub_samples():
            where = f'{self.name}[{self.split}] {key}'
            if label not in range(len(self.class_names)):
                raise ValueError(f'{where}: the label is {label}, accepted are 0 to {len(self.class_names) - 1}')
            try:
                image = read_image(data, where, self.input_img_mode, self.value_range)
            except DamagedImageError as error:
                if not self.skip_damaged:
                    raise
                _logger.log(level, 'skipped: %s', error)
                yield None, label
                continue
            yield image if self.transform is None else self.transform(image), label

    def _open_hub(self, data_dir: Optional[str], **options) -> Any:
        from timm.data.readers.reader_hfids import ReaderHfids  # create_dataset would take the name in lower case
        source = source_of(self.name.partition('/')[2], data_dir)
        if source['name'] or source['data_dir']:
            raise ValueError(f'{self.name}: a stream has no choice of configurations or formats; hfds/ has')
        try:
            return ReaderHfids(source['path'], root=data_dir, **options)
        except ValueError as error:
            raise ValueError(f'{self.name}: {one_line(error)}; hfds/ instead may do') from error

    def _open_shards(self, data_dir: Optional[str], **options) -> Any:
        if not data_dir:
            raise ValueError('wds/: name the folder of the shards and of _info.json with --data-dir')
        try:
            return timm.data.create_dataset(self.name, root=data_dir, **options).reader
        except RuntimeError as error:  # an unknown split, no _info.json, or no package webdataset
            raise ValueError(f'{self.name}: {error}; {INFO}') from error
        except KeyError as error:
            raise ValueError(f"{self.name}: {data_dir}/_info.json has no {error} for a split; {INFO}") from error

    def _hub_classes(self) -> List[str]:
        import datasets
        names = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
        if not names:
            raise ValueError(f'{self.name}: column {self.reader.target_key!r} has no class names; use hfds/ instead')
        features = self.reader.builder.info.features
        if self.reader.input_key not in features:
            raise ValueError(
                f'{self.name}: no column {self.reader.input_key!r} for the images, only {", ".join(features)}')
        features = features.copy()
        features[self.reader.input_key] = datasets.Image(decode=False)
        self.reader.builder.info.features = features
        return names

    def _hub_samples(self) -> Iterator[Tuple[str, bytes, int]]:
        import fsspec
        worker = get_worker_info()
        for number, (image, label) in enumerate(self.reader):
            path, data = (image or {}).get('path'), (image or {}).get('bytes') or b''
            if path and not data:
                with fsspec.open(path, 'rb') as file:
                    data = file.read()
            yield path or f'sample {number} of worker {worker.id if worker else 0}', data, label

    def _shard_classes(self) -> List[str]:
        import webdataset
        try:
            with webdataset.gopen(os.path.join(self.reader.root, 'classnames.txt')) as file:
                return file.read().decode().splitlines()
        except OSError as error:
            raise ValueError(
                f'{self.name}: {self.reader.root} has no readable classnames.txt, the names of the classes in order of '
                f'the labels, a line each: {error}') from error

    def _shard_samples(self) -> Iterator[Tuple[str, bytes, int]]:
        import webdataset
        reader, worker = self.reader, get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        reader.set_loader_cfg(workers)
        shards = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
        passed, target = 0, len(reader) // workers
        for cycle in itertools.count():
            rng = random.Random(f'{self.seed} {reader.epoch_count.value} {cycle}')
            if self.training:
                rng.shuffle(shards)  # as in the other workers and processes
            mine = shards[reader.dist_rank * workers + worker_id::reader.dist_num_replicas * workers]
            if not mine:
                if self.training:
                    raise ValueError(
                        f'{self.name}[{self.split}]: {len(shards)} shards are too few for '
                        f'{reader.dist_num_replicas} processes of {workers} workers; use fewer --workers')
                return
            stages = [webdataset.SimpleShardList(mine), webdataset.tarfile_to_samples()]
            if self.training:
                stages.append(webdataset.shuffle(reader.sample_shuffle_size, reader.sample_initial_size, rng=rng))
            passed_before = passed
            try:
                for sample in webdataset.DataPipeline(*stages):
                    if self.training and passed == target:
                        return
                    yield self._shard_sample(sample)
                    passed += 1
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(f'{self.name}[{self.split}]: a shard is damaged: {error}') from error
            if passed == passed_before:
                raise ValueError(f'{self.name}[{self.split}]: no samples in {", ".join(mine)}')
            if not self.training:
                return

    def _shard_sample(self, sample: Dict[str, Any]) -> Tuple[str, bytes, int]:
        key, field = sample['__key__'], self.reader.target_key or self.reader.split_info.alt_label
        where = f'{Path(sample["__url__"]).name} {key}'
        suffixes = self.reader.input_key.split(';')
        data = next((sample[suffix] for suffix in suffixes if suffix in sample), b'')
        try:
            return where, data, int(json.loads(sample['json'])[field] if field else sample['cls'])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{self.name}[{self.split}] {where}: no label: {error!r}') from None
