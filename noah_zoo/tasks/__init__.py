"""What a model is trained for: one class per image, several, re-identification, or a task of your own."""
from typing import Dict

from .base import Task
from .multiclass import Multiclass
from .multilabel import Multilabel
from .reid import Reid

__all__ = ['Multiclass', 'Multilabel', 'Reid', 'TASKS', 'Task', 'find_task', 'register_task']

TASKS: Dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known by its name.

    Raises:
        ValueError: If there is another of that name.
    """
    if type(TASKS.get(task.name, task)) is not type(task):
        raise ValueError(f'there is a task {task.name!r} already, {type(TASKS[task.name]).__name__}')
    TASKS[task.name] = task
    return task


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        ValueError: If there is none.
    """
    if name not in TASKS:
        raise ValueError(f'task={name!r} is not one of {", ".join(TASKS)}; one of your own has to be registered first')
    return TASKS[name]


for _task in (Multiclass(), Multilabel(), Reid()):
    register_task(_task)
