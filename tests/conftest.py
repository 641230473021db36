"""Tests reach no hub and take one thread each, so that results do not depend on the machine's load."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def quarter():
    """A sweep whose Init[B] optima fall as r^(-1/4)."""
    from known_sweeps import sweep_rows, sweeps  # here, since most tests have no sweep

    return sweeps(sweep_rows())
