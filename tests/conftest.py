"""Strictness for every test: float64, warnings as errors (pyproject.toml), seeded weights, one seeded generator."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "learned-init", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("learned-init")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _float64_and_seeded():
    torch.set_num_threads(1)  # one a worker: two workers with two threads each would wait for one another
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(1234)  # layers that a test builds have the same weights in every run; not a generator's seed
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """A folder of real data, where there is one: `LEARNED_INIT_DATA`, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("LEARNED_INIT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10").is_dir():
        pytest.skip("no real data: set LEARNED_INIT_DATA to a folder that holds cifar10/")
    return folder
