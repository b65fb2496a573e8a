from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from weightwire.errors import ConfigError, PublishError
from weightwire.metadata.endpoints import check_endpoint, interface_of, local_address, split


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as made:
        made.bind(("0.0.0.0", 0))
        made.listen()
        yield made.getsockname()[1]


def own_address() -> str:
    """An address of this machine that is not loopback; the machine's route outwards decides."""
    found = local_address("192.0.2.1:9")  # TEST-NET: nothing is sent
    if found.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return found


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:65536", "host:x", "host:\u0661"])
def test_endpoints_are_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError, match="not host:port"):
        split(text)
    assert split("[::1]:80") == ("::1", 80)
    assert split("name:80") == ("name", 80)


def test_h44_loopback_is_fine_where_the_server_is_here_too(listener: int) -> None:
    check_endpoint(f"127.0.0.1:{listener}", "127.0.0.1:1")
    check_endpoint(f"localhost:{listener}", "127.0.0.1:1")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3", "[::1]"])
def test_h44_loopback_is_refused_where_the_server_is_elsewhere(listener: int, host: str) -> None:
    address = own_address()
    with pytest.raises(PublishError) as caught:
        check_endpoint(f"{host}:{listener}", "192.0.2.1:9")
    text = str(caught.value)
    assert "loopback" in text
    assert f"advertise {address} of interface {interface_of(address)}" in text
    assert interface_of(address) in {name for _, name in socket.if_nameindex()}


def test_h44_an_address_that_nobody_can_reach_is_refused_by_name(listener: int) -> None:
    with pytest.raises(PublishError, match="no address that can be reached"):
        check_endpoint(f"0.0.0.0:{listener}", "127.0.0.1:1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(
            PublishError, match=f"127.0.0.1:{port} .*cannot be reached.*advertise 127.0.0.1 of interface lo"
        ):
            check_endpoint(f"127.0.0.1:{port}", "127.0.0.1:1")
    with pytest.raises(PublishError, match="cannot be resolved"):
        check_endpoint("no-such-host.invalid:80", "127.0.0.1:1")


def test_h44_a_right_address_passes(listener: int) -> None:
    check_endpoint(f"{own_address()}:{listener}", "192.0.2.1:9")
