"""Where to connect and as whom: the environment variables, and the credentials file."""

import os
import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nkeys
from nats.aio.client import RawCredentials

from jobqueue.errors import Failure, printable

LOCAL = "nats://localhost:4222"
SYNADIA_CLOUD = "tls://connect.ngs.global"
MAX_CREDENTIALS = 64 * 1024  # characters of a credentials file


class Credentials(RawCredentials):
    """A .creds file, checked first: nats-py hangs on one without a JWT.

    Raises:
        Failure: it is no such file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.read()

    def read(self) -> None:
        """Read the file again."""
        file = printable(str(self._file))
        try:
            with self._file.open(encoding="ascii") as opened:
                content = opened.read(MAX_CREDENTIALS)
        except OSError as error:
            raise Failure(f"cannot read the credentials file {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            content = ""
        # As in nkeys for Go: the first two blocks between lines of dashes are the JWT and the seed.
        _, *blocks = re.split(r"^[ \t]*---.*---[ \t]*$", content, flags=re.MULTILINE)
        try:
            jwt, seed = (block.strip() for block in blocks[0:4:2])
            if not re.fullmatch(r"[\w.=-]+", jwt):
                raise ValueError
            nkeys.from_seed(bytearray(seed, "ascii")).wipe()
        except Exception:
            raise Failure(f"{file} is not a credentials file: it needs a user JWT and its seed") from None
        self.data = (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )


def read_environment() -> tuple[list[str], dict[str, Any]]:
    """Return the servers, as URLs without secrets, and nats-py's options that authenticate us.

    Raises:
        Failure: a variable is malformed; the line shows no secret.
    """
    credentials = os.environ.get("NATS_CREDENTIALS_FILE_PATH")
    urls = os.environ.get("NATS_URL") or (SYNADIA_CLOUD if credentials else LOCAL)
    servers: list[str] = []
    options: dict[str, Any] = {}
    for url in filter(None, (url.strip() for url in urls.split(","))):
        try:
            parts = urlsplit(url if "://" in url else f"nats://{url}")
            host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            server = f"{parts.scheme}://{host}:{parts.port or 4222}"
        except ValueError:
            host = None
        # A password's own "/", "?", "#" or "," ends the host too early, and would be shown with it.
        rest = "".join(parts[2:]).removesuffix("/") if host else ""
        cut = servers and "@" in url and "://" not in url
        if not host or rest or cut or parts.scheme not in ("nats", "tls") or printable(server) != server:
            raise Failure("NATS_URL must be URLs such as nats://localhost:4222, with commas between them")
        servers.append(server)
        # Not left in the URL: nats-py takes it literally, where natscli decodes it, and would not use it
        # for the other servers of a cluster.
        user: dict[str, Any] = {}
        if parts.password is not None:
            user = {"user": unquote(parts.username or ""), "password": unquote(parts.password)}
        elif parts.username:
            user = {"token": unquote(parts.username)}
        if user and options not in ({}, user):
            raise Failure("NATS_URL has two users in it: one is for all servers")
        options = user or options
    if not servers:
        raise Failure("NATS_URL has no URL in it")
    if credentials:
        options["user_credentials"] = Credentials(Path(credentials))
    if context := _tls_context():
        options["tls"] = context
    return servers, options


def _tls_context() -> ssl.SSLContext | None:
    """Return the TLS context for natscli's own variables: NATS_CA, NATS_CERT and NATS_KEY; None without them."""
    authority, certificate, key = (os.environ.get(f"NATS_{name}") for name in ("CA", "CERT", "KEY"))
    if not (authority or certificate or key):
        return None
    if bool(certificate) != bool(key):
        raise Failure("a client certificate needs both NATS_CERT and NATS_KEY")
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            context.load_cert_chain(certificate, key, password="")  # an encrypted key must not ask at the terminal
    except OSError as error:  # of ssl too
        raise Failure(f"cannot use the files of NATS_CA, NATS_CERT and NATS_KEY: {error.strerror or error}") from None
    return context
