"""Chat templates, rendered in a process of their own.

A template is code of whoever made the checkpoint. transformers' sandbox keeps it from the machine,
but not from looping for hours or filling the memory.
"""

from typing import Any

from qexport.errors import InputError
from qexport.runtime.worker import Worker

__all__ = ["TemplateWorker"]

_SECONDS = 5.0
_MEMORY = 512 << 20


class TemplateWorker(Worker):
    """Renders conversations."""

    def __init__(self, seconds: float = _SECONDS, memory: int = _MEMORY) -> None:
        super().__init__("qexport.runtime.template_worker", seconds, memory)

    def render(self, template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of a conversation, ready for an answer.

        Raises InputError where the template refuses, or takes too much time or memory.
        """
        asked = {"template": template, "messages": messages, "add_generation_prompt": True}
        answer = self.ask({**variables, **asked})
        if "error" in answer:
            raise InputError(f"the chat template refuses these messages ({answer['error']}).")
        return str(answer["text"])
