"""An OpenAI-compatible server over one model."""

from qexport.runtime.server.app import create_app
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.request_log import RequestLog
from qexport.runtime.server.run import run

__all__ = ["Limits", "RequestLog", "create_app", "run"]
