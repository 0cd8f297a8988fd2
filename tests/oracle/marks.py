"""Marks of the tests that ask the real engines of `.venv-oracle`."""

import pytest

from tests.oracle.install import FOLDER

__all__ = ["FOLDER", "NEEDS_ENVIRONMENT", "REAL_MODELS"]

NEEDS_ENVIRONMENT = pytest.mark.skipif(
    not (FOLDER / ".ready").exists(), reason="no .venv-oracle here; `make oracle` makes it"
)
REAL_MODELS = [pytest.mark.oracle, pytest.mark.slow, NEEDS_ENVIRONMENT]
