"""What the families written here share of timm's interface."""
from typing import List, Sequence, Union


def take_indices(num_stages: int, indices: Union[int, Sequence[int], None]) -> List[int]:
    """Which stages are asked for, as timm counts them: all (None), the last n (int), or these (negative from the end).

    Raises:
        ValueError: If a stage does not exist.
    """
    if indices is None:
        return list(range(num_stages))
    if isinstance(indices, int):
        if not 0 < indices <= num_stages:
            raise ValueError(f'indices={indices}: expected 1 to {num_stages} stages')
        return list(range(num_stages - indices, num_stages))
    if not all(-num_stages <= i < num_stages for i in indices):
        raise ValueError(f'indices={list(indices)}: expected stages from {-num_stages} to {num_stages - 1}')
    return [i % num_stages for i in indices]
