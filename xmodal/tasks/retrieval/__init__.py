"""Retrieval between pictures and texts."""

from xmodal.tasks.retrieval.task import Retrieval
