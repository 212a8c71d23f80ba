"""A login like the Hub's for Spaces: an OpenID provider on loopback, with pages that a visitor clicks through.

GET  /.well-known/openid-configuration    where the rest is
GET  /oauth/authorize                     a page that asks who it is, and whether the app may
GET  /oauth/allow, /oauth/deny            what its links lead to: back to the app, with a code or without
POST /oauth/token                         the access token for a code, once, to who knows the app's secret
GET  /oauth/jwks                          the key that its answers are signed with
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import ECKey


class Login:
    """The provider, running while its `with` block lasts; `accounts`: name → the token that the app gets."""

    def __init__(self, accounts: dict[str, str], *, lasts: int = 3600) -> None:
        self.accounts, self.lasts = accounts, lasts
        self.client, self.secret = "the-space", secrets.token_urlsafe()
        self.asked: list[dict[str, str]] = []  # what the app asked for, each time
        self.key = ECKey.generate_key("P-256", {"kid": "one", "alg": "ES256", "use": "sig"})
        self.codes: dict[str, dict[str, str]] = {}
        handler = type("BoundHandler", (Handler,), {"login": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def settings(self) -> dict[str, str]:
        """What the Hub puts into a Space's environment when its metadata says `hf_oauth`."""
        return {
            "SYSTEM": "spaces", "SPACE_ID": "me/gptq-to-marlin", "OPENID_PROVIDER_URL": self.url,
            "OAUTH_CLIENT_ID": self.client, "OAUTH_CLIENT_SECRET": self.secret,
            "OAUTH_SCOPES": "openid profile read-repos write-repos",
        }  # fmt: skip

    def __enter__(self) -> Login:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    login: Login

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = dict(parse_qsl(url.query))
        if url.path == "/.well-known/openid-configuration":
            self.json(200, {
                "issuer": self.login.url, "authorization_endpoint": f"{self.login.url}/oauth/authorize",
                "token_endpoint": f"{self.login.url}/oauth/token", "jwks_uri": f"{self.login.url}/oauth/jwks",
                "id_token_signing_alg_values_supported": ["ES256"],
            })  # fmt: skip
        elif url.path == "/oauth/jwks":
            self.json(200, {"keys": [self.login.key.as_dict(private=False)]})
        elif url.path == "/oauth/authorize" and asked["client_id"] == self.login.client:
            self.login.asked.append(asked)
            links = {name: f"allow?{urlencode({**asked, 'who': name})}" for name in self.login.accounts}
            links["No"] = f"deny?{urlencode(asked)}"
            body = "".join(f'<a href="{escape(to)}">{escape(name)}</a> ' for name, to in links.items())
            self.send(200, body.encode(), {"Content-Type": "text/html"})
        elif url.path == "/oauth/allow":
            code = secrets.token_urlsafe()
            self.login.codes[code] = asked
            self.back(asked, code=code)
        elif url.path == "/oauth/deny":
            self.back(asked, error="access_denied", error_description="The user said no")
        else:
            self.send(404, b"", {})

    def do_POST(self) -> None:
        """As the OAuth 2.0 of RFC 6749 has it in 4.1.3, with the client's secret in the header (2.3.1)."""
        form = {k: v[0] for k, v in parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).items()}
        who = base64.b64encode(f"{self.login.client}:{self.login.secret}".encode()).decode()
        granted = self.login.codes.pop(form["code"], None)
        if self.headers.get("Authorization") != f"Basic {who}":
            self.json(401, {"error": "invalid_client"})
        elif granted is None or granted["redirect_uri"] != form["redirect_uri"]:
            self.json(400, {"error": "invalid_grant"})
        else:
            name, now = granted["who"], int(time.time())
            claims = {
                "iss": self.login.url, "aud": self.login.client, "sub": name, "nonce": granted["nonce"], "iat": now,
                "exp": now + 60, "name": name, "preferred_username": name, "profile": f"{self.login.url}/{name}",
                "picture": "",
            }  # fmt: skip
            signed = jwt.encode({"alg": "ES256", "kid": "one"}, claims, self.login.key)
            self.json(200, {
                "access_token": self.login.accounts[name], "token_type": "bearer", "expires_in": self.login.lasts,
                "scope": granted["scope"], "id_token": signed,
            })  # fmt: skip

    def back(self, asked: dict[str, str], **answer: str) -> None:
        to = asked["redirect_uri"]
        mark = "&" if "?" in to else "?"
        self.send(302, b"", {"Location": f"{to}{mark}{urlencode({**answer, 'state': asked['state']})}"})

    def json(self, status: int, value: Any) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
