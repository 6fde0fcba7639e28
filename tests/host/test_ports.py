"""The port at which ranks meet: nothing else may take it while they start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.host.local import LocalHost


def test_a_free_port_is_none_that_the_system_gives_to_others() -> None:
    """A kill test failed when a connection was given the port before rank 0 listened."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    least = int(given.read_text().split()[0]) if given.exists() else 32768
    ports = [LocalHost({}).free_port() for _ in range(20)]
    assert all(1024 < port < least for port in ports)
    assert len(set(ports)) > 10, "launches that start together have ports of their own"


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: port)
        with pytest.raises(UserError, match="give --master_port"):
            LocalHost({}).free_port()
    assert LocalHost({}).free_port() == port
