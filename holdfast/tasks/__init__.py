"""Tasks: rows from folders, files, the Hub or our own generator, checked before any training."""

from holdfast.tasks.generated import BUILTIN
from holdfast.tasks.load import load_task
from holdfast.tasks.table import Columns
from holdfast.tasks.task import METRICS, Prediction, Row, Task, slug

__all__ = ["BUILTIN", "METRICS", "Columns", "Prediction", "Row", "Task", "load_task", "slug"]
