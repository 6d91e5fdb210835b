"""Recall and copying, generated: MQAR, copying, Repeat After Me, induction heads, phonebook, MAD's recall."""

from tasks.recall.config import RecallTaskConfig, Size
from tasks.recall.task import RecallTask
from tasks.recall.types import Generator, Rows

__all__ = ["Generator", "RecallTask", "RecallTaskConfig", "Rows", "Size"]
