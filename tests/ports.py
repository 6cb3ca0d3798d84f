"""Ports for the servers that tests start."""

import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports below the system's own range and outside those that Ray gives its workers (10002-19999)."""
    ports: list[int] = []
    for port in random.sample(range(20000, 30000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")
