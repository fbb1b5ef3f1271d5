"""Visual question answering."""

from xmodal.tasks.vqa.task import VQA, Answer
