"""Runs scripts/train.py with FSDP2 on CPUs. Accelerate shards on GPUs alone, so it is told that these are some."""
import os
import runpy
import sys
from pathlib import Path

os.environ.update(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_STATE_DICT_TYPE='SHARDED_STATE_DICT')

from accelerate import Accelerator  # noqa: E402
from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

PartialState(cpu=True)
PartialState._shared_state['distributed_type'] = DistributedType.MULTI_GPU
prepare = Accelerator.prepare


def checked(self, *args):
    prepared = prepare(self, *args)
    assert self.is_fsdp2 and all(isinstance(p, DTensor) for p in prepared[0].parameters())
    return prepared


Accelerator.prepare = checked
sys.argv[0] = str(Path(__file__).resolve().parents[2] / 'scripts' / 'train.py')
runpy.run_path(sys.argv[0], run_name='__main__')
