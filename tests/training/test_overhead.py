"""What the trainer costs beside a bare loop over the same model and the same batches, measured in one run."""
import statistics
import time

import pytest
import torch
from torch import nn

import noah_zoo  # noqa: F401
from noah_zoo.data.fashion_mnist import FASHION_MNIST_DIR
from noah_zoo.training import TrainConfig
from noah_zoo.training.trainer import Trainer

UPDATES = 40


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST_DIR.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_engine_and_input_pipeline_add_at_most_a_tenth(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other core loads
    try:
        run = Trainer(TrainConfig(
            model='mobilenetv2_035_noah', output=str(tmp_path), img_size=64, batch_size=64, lr=0.01, workers=1,
            cpu=True, model_kwargs=dict(output_stride=16), smoke=UPDATES))
        run.resume()
        run.epoch_batches()
        batches = [batch for _, batch in zip(range(UPDATES), run.train_loader)]
        criterion = nn.CrossEntropyLoss()

        def bare():
            run.model.train()
            for images, targets in batches:
                criterion(run.model(images), targets).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()

        def engine():
            run.progress.batch = 0
            run.train_epoch(lambda: 0.)

        times = {bare: [], engine: []}
        for _ in range(6):
            for loop in times:
                begin = time.perf_counter()
                loop()
                times[loop].append(time.perf_counter() - begin)
        seconds = {loop.__name__: statistics.median(found[1:]) for loop, found in times.items()}
        print({name: f'{UPDATES * 64 / value:.0f} images/s' for name, value in seconds.items()})
        assert seconds['engine'] <= 1.1 * seconds['bare'], seconds
    finally:
        torch.set_num_threads(threads)
