"""Trained models that several engines are asked about."""

import pytest

from qexport.checkpoint import Checkpoint
from tests.oracle.models import trained


@pytest.fixture(scope="session")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """SmolLM2 after 20 steps of training at 4 bits, groups of 64."""
    return trained(tmp_path_factory.mktemp("four") / "run", "4", 20)
