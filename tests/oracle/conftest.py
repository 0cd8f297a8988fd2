"""Trained models that several engines are asked about."""

import fcntl
import os

import pytest

from qexport.checkpoint import Checkpoint
from tests.oracle.models import trained


@pytest.fixture(scope="session")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """SmolLM2 after 60 steps of training at 4 bits, groups of 64; once for all of xdist's workers.

    A finished run is not trained again.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "four_bits.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return trained(folder / "four_bits", "4", 60)
