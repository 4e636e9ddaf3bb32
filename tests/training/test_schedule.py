"""The one-cycle schedule."""
import pytest
import torch
from torch import nn

from noah_zoo.training.schedule import OneCycle


def test_one_cycle_is_pytorchs_and_goes_on():
    def optimizer():
        groups = [{'params': [nn.Parameter(torch.zeros(1))], 'lr_scale': scale} for scale in (1., 10.)]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    ours, theirs = optimizer(), optimizer()
    schedule = OneCycle(ours, 10)
    reference = torch.optim.lr_scheduler.OneCycleLR(theirs, [0.1, 1.], total_steps=10)
    rates = []
    for update in range(10):
        schedule.step_update(update)
        rates.append([group['lr'] for group in ours.param_groups])
        assert rates[-1] == [group['lr'] for group in theirs.param_groups]
        ours.step()
        theirs.step()
        if update < 9:
            reference.step()
        if update == 4:  # goes on in another process
            state = (ours.state_dict(), schedule.state_dict())
            ours = optimizer()
            schedule = OneCycle(ours, 10)
            ours.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
    assert max(rate[0] for rate in rates) == pytest.approx(0.1) and rates[0][1] == pytest.approx(1 / 25)
