"""An OpenAI-compatible server over one model."""

from qexport.runtime.server.app import create_app
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.observe import RequestLog
from qexport.runtime.server.run import run

__all__ = ["Limits", "RequestLog", "create_app", "run"]
