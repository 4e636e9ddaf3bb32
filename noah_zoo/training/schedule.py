"""The one-cycle learning rate, which timm.scheduler lacks."""
from typing import Any, Dict

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


class OneCycle:
    """PyTorch's `OneCycleLR`, of all updates of a run, with the methods of timm's schedulers.

    The learning rates of the optimizer's groups, times timm's `lr_scale`, are the highest ones.
    """

    def __init__(self, optimizer: Optimizer, updates: int) -> None:
        highest = [group['lr'] * group.get('lr_scale', 1.) for group in optimizer.param_groups]
        self.scheduler = OneCycleLR(optimizer, highest, total_steps=updates)

    def step_update(self, num_updates: int) -> None:
        """Set the learning rates for the update after so many."""
        if self.scheduler.last_epoch < num_updates:
            self.scheduler.load_state_dict(dict(last_epoch=num_updates - 1, _step_count=num_updates + 1))
            self.scheduler.step()

    def state_dict(self) -> Dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)
