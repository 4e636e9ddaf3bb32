"""What a model is trained for: one class per image, several, re-identification, or a task of your own."""
from typing import Dict

from .base import Task
from .multiclass import Multiclass
from .multilabel import Multilabel
from .reid import Reid

__all__ = ['Multiclass', 'Multilabel', 'Reid', 'TASKS', 'Task', 'find_task', 'register_task']

TASKS: Dict[str, Task] = {task.name: task for task in (Multiclass(), Multilabel(), Reid())}
BUILT_IN = tuple(TASKS)


def register_task(task: Task) -> Task:
    """Make a task known by its name; one of that name that was registered before is replaced.

    Raises:
        ValueError: If it is the name of a built-in task.
    """
    if task.name in BUILT_IN and type(task) is not type(TASKS[task.name]):
        raise ValueError(f'task={task.name!r} is built in; choose another name')
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
