"""Object detection by names, and referring expressions."""

from xmodal.tasks.detection.task import Detection
