"""The process that renders chat templates: a checkpoint's own code, with little memory and time.

`python -m qexport.runtime.template_worker BYTES SECONDS`; a line has {"template", "messages", ...},
and its answer {"text"} or {"error"}.
"""

from typing import Any

from qexport.runtime.worker import answer_lines

__all__ = ["main"]


def _answer(request: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, template = request.pop("messages"), request.pop("template")
    try:
        texts, _ = render_jinja_template([messages], chat_template=template, **request)
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # the template's own code: it may raise anything
        return {"error": str(error)[:500] or type(error).__name__}
    return {"text": texts[0]}


def main() -> None:
    """Answer until stdin ends."""
    from transformers.utils import chat_template_utils  # noqa: F401  # before memory is limited

    answer_lines(_answer)


if __name__ == "__main__":
    main()
