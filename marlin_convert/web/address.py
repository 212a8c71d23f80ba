"""Where the page is served."""

from __future__ import annotations

import socket

from ..errors import OptionError

#: This computer itself: only there, its user may use their login.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def require_address(host: str, port: int) -> None:
    """Raise OptionError where no page can be served: Gradio itself would try for minutes."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, UnicodeError) as error:  # the latter for a name that is none
        reason = str(getattr(error, "strerror", None) or "it is no name of a computer").split(" (")[0]
        raise OptionError(
            f"{host!r}, port {port}: no page can be served there: {reason}; give another --host or --port (0 takes the "
            "first that is free)."
        ) from None
