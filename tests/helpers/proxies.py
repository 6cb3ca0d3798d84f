"""Proxies in the environment that accept no connection, as on a machine whose proxy has gone."""

DEAD = "http://127.0.0.1:9"  # no program listens on this port
NAMES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
DEAD_PROXIES = {variant: DEAD for name in NAMES for variant in (name, name.upper())}
