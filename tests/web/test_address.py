"""Where the page can be served. Needs no Gradio."""

from __future__ import annotations

import socket

import pytest

from marlin_convert.errors import OptionError
from marlin_convert.web.address import require_address


def test_free_addresses() -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        require_address(host, 0)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError) as error:
            require_address("127.0.0.1", port)
    assert error.value.message == (
        f"'127.0.0.1', port {port}: no page can be served there: Address already in use; give another --host or --port "
        "(0 takes the first that is free)."
    )
    require_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["256.1.1.1", "nosuch.invalid", "a..b", "x" * 300, "192.0.2.1", "\x1b[2J"])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(OptionError, match=r"no page can be served there: .*; give another --host or --port"):
        require_address(host, 0)
