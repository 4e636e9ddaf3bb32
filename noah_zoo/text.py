"""How things are said: a few of many, an error in a line, names that come near, tables."""
import difflib
import math
import re
from typing import Any, Iterable, Optional, Sequence


def some(items: Iterable[Any], most: int = 3, between: str = ', ') -> str:
    """The first few, and how many more there are: 'a, b, c and 7 more'."""
    texts = [' '.join(str(item).split()) for item in items]
    return between.join(texts[:most]) + (f' and {len(texts) - most} more' if len(texts) > most else '')


def one_line(error: BaseException) -> str:
    """What an error says, in a line; its type if it says nothing. What comes from a worker of a DataLoader has the
    worker's traceback in its text, which is left out."""
    _, begin, traceback = str(error).rpartition('Traceback (most recent call last):\n')
    raised = re.search(r'^[\w.]+: (.*)', traceback, re.MULTILINE | re.DOTALL)
    text = raised[1] if begin and raised else str(error)
    return ' '.join(text.split()) or type(error).__name__


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> Optional[str]:
    """The names that come near one that is not known, as text; None if none does."""
    return ', '.join(difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)) or None


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become None, also inside of dicts and lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in (header, ('---',) * len(header), *rows))
