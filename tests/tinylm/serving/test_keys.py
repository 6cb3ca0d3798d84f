"""API keys and their file, and who may call with and without keys."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.serving import keys
from tinylm.serving.access import Access, is_local, is_loopback, is_own_name
from tinylm.serving.calls import Refused
from tinylm.serving.grpc.methods import address_of
from tinylm.serving.keys import Key, KeyFile, KeyFileError, add_key, hash_key, make_key, read_keys, read_line
from tinylm.serving.limits import Limits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def name_of(known: KeyFile, secret: str) -> str | None:
    key = known.find(secret)
    return None if key is None else key.name


def tinylm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tinylm.cli", *arguments], capture_output=True, text=True, check=False)


def test_the_command_prints_a_key_and_keeps_only_its_hash(file: Path):
    printed = [tinylm("key", name, "--file", str(file)).stdout.strip() for name in ("alice", "bob")]
    assert len(set(printed)) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not any(secret in file.read_text() for secret in printed)
    assert [name_of(KeyFile(file), secret) for secret in printed] == ["alice", "bob"]
    again = tinylm("key", "alice", "--file", str(file))
    assert again.returncode == 1
    assert "'alice' already" in again.stderr
    assert len(read_keys(file)) == 2


def test_only_keys_in_the_file_have_a_name(file: Path):
    secret, line = make_key("alice")
    file.write_text(f"# ours\n\n{line}   # since May\n")
    known = KeyFile(file)
    assert name_of(known, secret) == "alice"
    for wrong in ("", "alice", secret[:-1], secret + " ", secret.upper(), hash_key(secret), "ключ"):
        assert name_of(known, wrong) is None


def test_a_changed_file_takes_effect_without_a_restart(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 0.0)
    (first, first_line), (second, second_line) = make_key("first"), make_key("second")
    file.write_text(first_line)
    known = KeyFile(file)
    replacement = file.with_suffix(".new")
    replacement.write_text(second_line)
    replacement.replace(file)
    assert (name_of(known, first), name_of(known, second)) == (None, "second")
    # An unreadable file changes nothing, so that a mistake in the editor locks out no client.
    file.write_text("a wrong line")
    assert name_of(known, second) == "second"
    file.unlink()
    assert name_of(known, second) == "second"
    file.write_text(first_line)
    assert (name_of(known, first), name_of(known, second)) == ("first", None)


def test_the_file_is_not_read_for_every_call(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "LOOK_AGAIN_S", 1000.0)
    secret, line = make_key("alice")
    file.write_text(line)
    known = KeyFile(file)
    file.write_text("")
    assert name_of(known, secret) == "alice"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("alice", "line 1"),
        ("\nalice sha256:12", "line 2"),
        ("alice md5:" + "0" * 64, "line 1"),
        ("a b sha256:" + "0" * 64, "line 1"),
        (f"a sha256:{'0' * 64}\na sha256:{'1' * 64}", "'a' occurs twice"),
        (
            f"a sha256:{'0' * 64} per_minute=3",
            "'per_minute' is not a field: the fields are requests_per_minute",
        ),
        (f"a sha256:{'0' * 64} priority=1 priority=2", "line 1: priority occurs twice"),
        *(
            (f"a sha256:{'0' * 64} {field}={value}", f"{field} is '{value}': it must be a whole number from {limits}")
            for field, limits, values in (
                ("requests_per_minute", "1 to 1000000", ["0", "-1", "1000001", "", "1.5", "٣", "9" * 30]),
                ("tokens_per_minute", "1 to 1000000000", ["0", "1000000001"]),
                ("priority", "0 to 100", ["-1", "101", "high"]),
            )
            for value in values
        ),
    ],
)
def test_a_wrong_line_is_named(file: Path, text: str, named: str):
    file.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        KeyFile(file)
    assert str(file) in str(caught.value)
    assert named in str(caught.value)


FIELD_VALUES = st.fixed_dictionaries(
    {field: st.one_of(st.none(), st.integers(least, most)) for field, (least, most) in keys.FIELDS.items()}
)


@given(fields=FIELD_VALUES)
def test_a_line_keeps_its_limits_and_priority(fields: dict[str, int | None]):
    secret, line = make_key("alice", **fields)
    key = read_line(line)
    assert (key.name, key.digest) == ("alice", hash_key(secret))
    limits = (key.limits.requests_per_minute, key.limits.tokens_per_minute)
    assert limits == (fields["requests_per_minute"], fields["tokens_per_minute"])
    assert key.priority == (fields["priority"] or 0)
    assert key.limits.is_set == any(limit is not None for limit in limits)


def test_a_line_of_an_earlier_version_has_no_limits(file: Path):
    file.write_text(f"alice sha256:{'0' * 64}\n")
    assert read_keys(file)["alice"] == Key("alice", "0" * 64, Limits(None, None), priority=0)


def test_the_command_writes_limits_and_refuses_wrong_ones(file: Path):
    options = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--priority", "5"]
    assert tinylm("key", "alice", "--file", str(file), *options).returncode == 0
    key = read_keys(file)["alice"]
    assert (key.limits, key.priority) == (Limits(60, 9000), 5)
    wrong = tinylm("key", "bob", "--file", str(file), "--priority", "101")
    assert wrong.returncode == 1
    assert "priority is '101': it must be a whole number from 0 to 100" in wrong.stderr
    assert list(read_keys(file)) == ["alice"]


def test_a_missing_file_and_an_invalid_name_are_named(tmp_path: Path):
    with pytest.raises(KeyFileError, match=r"none\.txt cannot be read"):
        KeyFile(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="'two words'"):
        make_key("two words")


def test_only_addresses_of_this_machine_are_local():
    assert all(is_local(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    # 0.0.0.0 is open to all; the others belong to other machines or are no addresses.
    assert not any(is_local(host) for host in ("0.0.0.0", "::", "192.0.2.77", "198.51.100.1", "example.org", ""))


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        *(
            (name + port, True)
            for name in ("localhost", "Localhost", "tinylm.localhost")
            for port in ("", ":8000", ":")
        ),
        *((name + port, True) for name in ("127.0.0.1", "[::1]", "192.0.2.77") for port in ("", ":8000")),
        (socket.gethostname(), True),
        *((name, False) for name in ("example.org", "example.org:8000", "localhost.example.org", "notlocalhost", "")),
        ("127.0.0.1.example.org:8000", False),
    ],
)
def test_without_keys_http_needs_a_host_name_of_this_machine(host: str, is_own: bool):
    assert is_own_name(host) == is_own
    access = Access(None, allow_anonymous=False)
    if is_own:
        assert access.check("127.0.0.1", None, host) is None
    else:
        with pytest.raises(Refused, match="without API keys"):
            access.check("127.0.0.1", None, host)
    assert Access(None, allow_anonymous=True).check("192.0.2.77", None, host) is None


def test_only_loopback_is_closed_to_other_machines():
    """Other machines reach the addresses that this machine has in a network."""
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    own = [a.address for of in psutil.net_if_addrs().values() for a in of if a.family == socket.AF_INET]
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "", *own) if not host.startswith("127."))


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1"),
        ("ipv6:[::1]:5000", "::1"),
        ("ipv6:%5Bfe80::fc:1%254%5D:50832", "fe80::fc:1%4"),  # link-local
        ("unix:/tmp/socket", None),
        ("unix:", None),
        ("ipv9:1.2.3.4:5", ""),
        ("", ""),
    ],
)
def test_an_unknown_form_of_peer_is_not_local(peer: str, address: str | None):
    assert address_of(peer) == address
    access = Access(None, allow_anonymous=False)
    if address is None or address in ("127.0.0.1", "::1"):
        assert access.check(address, None) is None
    else:
        with pytest.raises(Refused):
            access.check(address, None)


def test_a_key_can_follow_a_line_without_newline(file: Path):
    for end in ("", "   # since May"):
        first, line = make_key("alice")
        file.write_text(line + end)
        second = add_key(file, "bob")
        known = KeyFile(file)
        assert (name_of(known, first), name_of(known, second)) == ("alice", "bob")
    with pytest.raises(KeyFileError, match="a key of the name 'bob' already"):
        add_key(file, "bob")


@pytest.mark.parametrize("space", ["", " ", "\t", "\r\n"])
def test_whitespace_around_a_sent_key_is_ignored(file: Path, space: str):
    secret = add_key(file, "bob")
    access = Access(file, allow_anonymous=False)
    assert access.check("10.0.0.1", f"Bearer {space}{secret}{space}").name == "bob"
