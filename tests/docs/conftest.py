"""Shared by the tests of the documentation."""

from pathlib import Path

import pytest

from tests.docs.world import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models that pages speak of."""
    return write_world(tmp_path_factory.mktemp("docs"))
