"""A place without data: what the tests of every loader start from."""

import socket

import pytest
from huggingface_hub import constants


@pytest.fixture
def closed_port():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        yield reserved.getsockname()[1]


@pytest.fixture
def alone(monkeypatch, tmp_path, closed_port):
    """No folder, an empty cache and no network. Returns the cache's folder."""
    for variable in ("LEARNED_INIT_DATA", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    return tmp_path / "hub"
