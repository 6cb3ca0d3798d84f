"""Everything that depends on Ray's internals or starts Ray's processes.

`internals` names each private part of Ray that TinyLM uses. `haproxy` changes the HAProxy config that Ray writes.
`launch` and `monitor` are commands.
"""
