"""Trained models that several engines are asked about."""

import fcntl
import os

import pytest

from qexport.checkpoint import Checkpoint
from tests.oracle.models import trained


@pytest.fixture(scope="session")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """SmolLM2 after 20 steps of training at 4 bits, groups of 64; once for all of xdist's workers.

    A finished run is not trained again. More steps on this text make its answers to questions
    flatter, and near ties fall either way: after 60, 17 to 18 of 20 are those of the dense twin.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "four_bits.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return trained(folder / "four_bits", "4", 20)
