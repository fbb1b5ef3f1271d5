"""Image generation from text."""

from xmodal.tasks.generation.task import Generation
