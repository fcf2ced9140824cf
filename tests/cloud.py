"""What Synadia Cloud is, seen from a client: nats-server in operator mode, behind TLS, with limits on the account.

Source: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt.
"""

import base64
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import nkeys
import trustme
from nats.aio.client import Client

from tests.harness import Server

UNLIMITED = {**dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1), "wildcards": True}
LIMITS = UNLIMITED | {"payload": 1024 * 1024, "disk_storage": 4 * 1024**3, "streams": 10, "consumer": 100}


class Key:
    """A key pair of an operator, an account or a user, which signs JWTs."""

    def __init__(self, prefix: int) -> None:
        self.seed: bytes = nkeys.encode_seed(os.urandom(32), prefix)
        self._pair = nkeys.from_seed(bytearray(self.seed))
        self.public: str = self._pair.public_key.decode()

    def jwt(self, kind: str, subject: "Key", expires: float | None = None, **nats: Any) -> str:
        """Return a JWT about the owner of another key."""
        header = {"typ": "JWT", "alg": "ed25519-nkey"}
        claims = {
            "iat": int(time.time()),
            "iss": self.public,
            "sub": subject.public,
            "name": kind,
            "nats": {"type": kind, "version": 2, **nats},
        }
        if expires is not None:
            claims["exp"] = int(expires)
        signed = ".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{_base64(self._pair.sign(signed.encode()))}"


class Cloud(Server):
    """A server with an operator, one account and its users, and a certificate that only `authority` vouches for."""

    def __init__(self, directory: Path, *, flags: str = "") -> None:
        self._flags = flags
        self._operator, self._system, self._account = (
            Key(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_ACCOUNT)
        )
        self._jwts = [
            self._operator.jwt("operator", self._operator),
            self._operator.jwt("account", self._system, limits=UNLIMITED),
        ]
        self._users: dict[str, Key] = {}
        self.authority = directory / "authority.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.authority))
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
        self.directory = directory
        super().__init__(directory, self._configuration(LIMITS))

    @property
    def url(self) -> str:
        return f"tls://127.0.0.1:{self.port}"

    def _configuration(self, limits: dict[str, Any], revoked: Sequence[str] = ()) -> str:
        revocations = {self._users[name].public: int(time.time()) for name in revoked}
        operator, system = self._jwts
        accounts = {
            self._system.public: system,
            self._account.public: self._operator.jwt("account", self._account, limits=limits, revocations=revocations),
        }
        pem = self.directory / "server.pem"
        return (
            f"operator: {operator}\n"
            f"system_account: {self._system.public}\nresolver: MEMORY\nresolver_preload: {json.dumps(accounts)}\n"
            f'tls {{ cert_file: "{pem}", key_file: "{pem}" }}\n{self._flags}\n'
        )

    def change(self, revoked: Sequence[str] = (), **limits: Any) -> None:
        """Change what the account may use, and who may not connect any more."""
        self.configure(self._configuration(LIMITS | limits, revoked))

    def user(
        self,
        name: str,
        *,
        expires: float | None = None,
        publish: dict[str, list[str]] | None = None,
        subscribe: dict[str, list[str]] | None = None,
    ) -> dict[str, str]:
        """Write a user's .creds file, and return the environment for who uses it.

        Args:
            name: of the file.
            expires: seconds since 1970.
            publish: what to `allow` and to `deny`.
            subscribe: the same.
        """
        user = self._users[name] = Key(nkeys.PREFIX_BYTE_USER)
        unlimited = {"subs": -1, "data": -1, "payload": -1}
        jwt = self._account.jwt("user", user, expires, pub=publish or {}, sub=subscribe or {}, **unlimited)
        file = self.directory / name
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
        )
        return {"NATS_CREDENTIALS_FILE_PATH": str(file), "SSL_CERT_FILE": str(self.authority)}

    @asynccontextmanager
    async def client(self, name: str = "client", **options: Any) -> AsyncIterator[Client]:
        """Connect as a user, who may be a new one that may do anything."""
        if name not in self._users:
            self.user(name)
        nc = await nats.connect(
            self.url,
            user_credentials=str(self.directory / name),
            tls=ssl.create_default_context(cafile=str(self.authority)),
            **options,
        )
        try:
            yield nc
        finally:
            await nc.close()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
