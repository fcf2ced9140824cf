"""A message's header block as it is on the wire. nats-py has one value for each name, and only UTF-8."""

START = b"NATS/1.0\r\n"


def read_headers(block: bytes) -> list[tuple[str, str]]:
    """Return the names and values, in their order. Bytes that aren't UTF-8 are escaped."""
    parts = (line.decode(errors="backslashreplace").partition(":") for line in _split(block))
    return [(name.strip(), value.strip()) for name, _, value in parts]


def find_header(block: bytes, name: str) -> str:
    """Return the first value of a header, or "" if there is none."""
    return next((value for other, value in read_headers(block) if other.lower() == name.lower()), "")


def replace_nats_headers(block: bytes, added: dict[str, str]) -> bytes:
    """Return a header block with some headers in place of those that told the server what to do (`Nats-...`)."""
    kept = [line for line in _split(block) if not line.strip().lower().startswith(b"nats-")]
    kept += [f"{name}: {value}".encode() for name, value in added.items()]
    return START + b"".join(line + b"\r\n" for line in kept) + b"\r\n"


def _split(block: bytes) -> list[bytes]:
    """Return each header with the further lines that are folded into it."""
    lines: list[bytes] = []
    for line in block.split(b"\r\n")[1:]:
        if line[:1] in (b" ", b"\t") and lines:
            lines[-1] += b"\r\n" + line
        elif line:
            lines.append(line)
    return lines
