"""Requests to this machine, whatever proxies the environment names in `http_proxy` and similar variables."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # opens a URL without a proxy


def without_proxy_for_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `no_proxy` and `NO_PROXY` with the hosts that they name in `environment`, and those of this machine.

    For programs and libraries that read proxies from their environment.
    """
    named = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    own = [host for host in map(str.strip, named.split(",")) if host]
    hosts = "*" if own == ["*"] else ",".join(dict.fromkeys([*own, *LOOPBACK]))  # "*" means all only when it is alone
    return {"no_proxy": hosts, "NO_PROXY": hosts}
