"""Run `noah-zoo train` with FSDP2 or DeepSpeed on CPUs. Accelerate shards on GPUs only, so these pass for GPUs.

    torchrun --standalone --nproc_per_node 2 tests/training/sharded.py fsdp --model ...
"""
import os
import sys
import time

strategy = sys.argv.pop(1)
if strategy == 'fsdp':
    os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_STATE_DICT_TYPE='SHARDED_STATE_DICT')
else:
    os.environ.update(
        ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_ZERO_STAGE=strategy[-1], DS_ACCELERATOR='cpu')

from accelerate import Accelerator  # noqa: E402
from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

if strategy == 'fsdp':
    PartialState(cpu=True)
    PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU
else:
    sys.argv.remove('--cpu')
    PartialState._prepare_backend = lambda self, *args: ('gloo', DistributedType.MULTI_CPU)
from noah_zoo.cli import main  # noqa: E402
from noah_zoo.training.run_folder import RunFolder  # noqa: E402

prepare, finished = Accelerator.prepare, RunFolder.finished


def late(self, config):
    if os.environ['RANK'] == '1' and not config.resume:
        time.sleep(4)  # on a busy machine, the other process is ready to train by now
    return finished(self, config)


def checked(self, *args):
    model, optimizer = prepare(self, *args)
    assert self.num_processes == 2 and self.device.type == 'cpu'
    if strategy == 'fsdp':
        from torch.distributed.tensor import DTensor
        assert self.is_fsdp2 and all(isinstance(p, DTensor) for p in model.parameters())
    else:
        assert model.zero_optimization_stage() == int(strategy[-1])
    return model, optimizer


Accelerator.prepare, RunFolder.finished = checked, late
sys.exit(main(['train', *sys.argv[1:]]))
