"""Run a real OAuth2 authorization and resource server: Authlib on Flask, as a process of its own.

Prints ``{"port": N}`` once it listens on 127.0.0.1, and ends when its standard input does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from authlib.integrations.flask_oauth2 import AuthorizationServer, ResourceProtector
from authlib.oauth2.rfc6749 import ClientMixin, TokenMixin, grants
from authlib.oauth2.rfc6750 import BearerTokenValidator
from flask import Flask, Response, jsonify, request
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler


class ClientCredentialsGrant(grants.ClientCredentialsGrant):  # type: ignore[misc]  # Authlib ships no types
    """The grant, with the credentials in the body or in the header."""

    TOKEN_ENDPOINT_AUTH_METHODS = ("client_secret_post", "client_secret_basic")


@dataclass(frozen=True)
class RegisteredClient(ClientMixin):  # type: ignore[misc]  # Authlib ships no types
    """The one client this server knows."""

    client_id: str
    client_secret: str

    def get_client_id(self) -> str:
        return self.client_id

    def get_default_redirect_uri(self) -> None:
        return None

    def get_allowed_scope(self, scope: str) -> str:
        return " ".join(word for word in (scope or "").split() if word == "tiles")

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return False

    def check_client_secret(self, client_secret: str) -> bool:
        return secrets.compare_digest(self.client_secret.encode(), client_secret.encode())

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method in ClientCredentialsGrant.TOKEN_ENDPOINT_AUTH_METHODS

    def check_response_type(self, response_type: str) -> bool:
        return False

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "client_credentials"


@dataclass(frozen=True)
class IssuedToken(TokenMixin):  # type: ignore[misc]  # Authlib ships no types
    """A token as the server remembers it."""

    client_id: str
    scope: str
    expires_in: int
    accepted_until: float

    def check_client(self, client: ClientMixin) -> bool:
        return bool(client.get_client_id() == self.client_id)

    def get_scope(self) -> str:
        return self.scope

    def get_expires_in(self) -> int:
        return self.expires_in

    def is_expired(self) -> bool:
        return time.time() >= self.accepted_until

    def is_revoked(self) -> bool:
        return False


@dataclass
class Ledger:
    """What the server has issued and answered."""

    leeway: float = 0.0
    tokens: dict[str, IssuedToken] = field(default_factory=dict)
    logins: int = 0
    unauthorized: int = 0
    served: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # guards all that is counted above

    def issue(self, token: dict[str, Any], client: RegisteredClient) -> None:
        until = time.time() + token["expires_in"] + self.leeway
        issued = IssuedToken(client.client_id, token.get("scope", ""), token["expires_in"], until)
        with self.lock:
            self.tokens[token["access_token"]] = issued
            self.logins += 1

    def revoke_all(self) -> None:
        with self.lock:
            self.tokens.clear()

    def count_data(self, status: int) -> None:
        with self.lock:
            if status == 401:
                self.unauthorized += 1
            elif status == 200:
                self.served += 1

    def counts(self) -> dict[str, int]:
        with self.lock:
            return {"logins": self.logins, "unauthorized": self.unauthorized, "served": self.served}


class LedgerValidator(BearerTokenValidator):  # type: ignore[misc]  # Authlib ships no types
    """Look bearer tokens up in the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def authenticate_token(self, token_string: str) -> IssuedToken | None:
        return self._ledger.tokens.get(token_string)


def make_app(client: RegisteredClient, lifetime: int, leeway: float) -> Flask:
    """Build the application: token endpoint, data, counts, revocation."""
    app, ledger = Flask(__name__), Ledger(leeway)
    app.config["OAUTH2_TOKEN_EXPIRES_IN"] = {"client_credentials": lifetime}
    server = AuthorizationServer(
        app,
        query_client=lambda client_id: client if client_id == client.client_id else None,
        save_token=lambda token, asked: ledger.issue(token, asked.client),
    )
    server.register_grant(ClientCredentialsGrant)
    protected = ResourceProtector()
    protected.register_token_validator(LedgerValidator(ledger))

    @app.post("/oauth/token")
    def issue_token() -> Response:
        return server.create_token_response()  # type: ignore[no-any-return]  # Authlib ships no types

    @app.get("/data/<int:number>")
    @protected()  # type: ignore[untyped-decorator]  # Authlib ships no types
    def data(number: int) -> Response:
        return jsonify({"number": number, "square": number * number})

    @app.get("/stats")
    def stats() -> Response:
        return jsonify(ledger.counts())

    @app.post("/revoke_all")
    def revoke_all() -> Response:
        ledger.revoke_all()
        return jsonify({"revoked": True})

    @app.after_request
    def count(response: Response) -> Response:
        if request.path.startswith("/data/"):
            ledger.count_data(response.status_code)
        return response

    return app


class KeepAliveHandler(WSGIRequestHandler):
    """Answer over HTTP/1.1, so that clients keep their connections, and log nothing."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class Server(ThreadedWSGIServer):
    """A threaded server that takes a burst of connections from many workers at once."""

    request_queue_size = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lifetime", type=int, default=3600, help="seconds that a token lives")
    parser.add_argument("--leeway", type=float, default=0.0, help="seconds that it is accepted beyond its life")
    parser.add_argument("--client-id", required=True)
    parser.add_argument("--client-secret-from-env", required=True, metavar="NAME")
    options = parser.parse_args()
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"  # this process serves plain http, on loopback only
    logging.disable(logging.CRITICAL)
    client = RegisteredClient(options.client_id, os.environ[options.client_secret_from_env])
    app = make_app(client, options.lifetime, options.leeway)
    server = Server("127.0.0.1", 0, app, handler=KeepAliveHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.port}), flush=True)
    sys.stdin.read()
    os._exit(0)  # connections may be open still; nobody reads their answers


if __name__ == "__main__":
    main()
