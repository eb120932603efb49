"""The tasks, by name."""

from fastbert.finetune.tasks.answer import Answer
from fastbert.finetune.tasks.base import Task
from fastbert.finetune.tasks.choose import Choose
from fastbert.finetune.tasks.classify import Classify
from fastbert.finetune.tasks.embed import Embed
from fastbert.finetune.tasks.tag import Tag

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Tag, Answer, Choose, Embed)}
