"""What needs no server and no process: all of it takes about a second."""

import asyncio
import functools
import json
import os
import re
import socket
import ssl
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from urllib.parse import quote

import nkeys
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats import errors as nats_errors
from nats.aio.msg import Msg
from nats.js.errors import APIError, ServiceUnavailableError

from jobqueue.connection.client import Client
from jobqueue.connection.environment import LOCAL, SYNADIA_CLOUD, read_environment
from jobqueue.dead_letters import headers
from jobqueue.dead_letters.advisories import Hint, parse_advisory
from jobqueue.dead_letters.letter import DeadLetter
from jobqueue.dead_letters.processing import Processing
from jobqueue.dead_letters.verifying import Verifier
from jobqueue.errors import MAX_TRACEBACK, Dead, Failure, Retry, describe_attempt, describe_error, printable
from jobqueue.jetstream import acks, reading, streams
from jobqueue.jetstream.durables import Durable
from jobqueue.jetstream.reasons import Reasons
from jobqueue.jetstream.tasks import AT_A_TIME, run_all, run_for_each
from jobqueue.publishing.message import Message, Outcome
from jobqueue.script import arguments, lines
from jobqueue.worker.options import check_work, make_config
from jobqueue.worker.pulling import Prefetch, describe_status
from jobqueue.worker.time_limit import TimeLimit

table = pytest.mark.parametrize
random_inputs = settings(
    max_examples=50,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # on a busy machine
)
SECOND = 10**9  # nanoseconds


# The first round trip counts in full, each later one for an eighth. 0.4 s of work is the most, 0.01 s the least.
@table("steps", [
    [(104, [0.02, 0.66], 10), (104, [], 15), (0, [], 7), (10_000, [8.1], 2007)], [(3001, [1e-6], 15)], [(1, [0.1], 1)],
])  # fmt: skip
async def test_the_prefetch_is_twice_throughput_times_round_trip(steps: list[tuple[int, list[float], int]]) -> None:
    prefetch, now = Prefetch(), asyncio.get_running_loop().time() + 1
    prefetch.update(now)
    for second, (completed, round_trips, size) in enumerate(steps, 1):
        for round_trip in round_trips:
            prefetch.note_round_trip(round_trip)
        for _ in range(completed):
            prefetch.count_completed()
        prefetch.update(now + second)
        assert prefetch.size == size


@table(("status", "description", "line"), [
    ("", "", ""), ("404", "No Messages", ""), ("408", "Request Timeout", ""), ("503", "other", "503 no responders"),
    ("409", "Consumer Deleted", "409 Consumer Deleted"), ("409", "a\x1b[2J\r\nNats-More: 3", r"409 a\x1b[2J"),
])  # fmt: skip
def test_only_an_unexpected_end_of_a_pull_request_is_described(status: str, description: str, line: str) -> None:
    assert describe_status({"Status": status, "Description": description}) == line


@table(("text", "nanoseconds"), [
    ("1970-01-01T00:00:00Z", 0), ("1970-01-01T00:00:01.5Z", 1_500_000_000), ("1970-01-01T00:00:00.000000001Z", 1),
    ("1970-01-02T01:30:00.25+01:30", 86_400_250_000_000), ("1970-01-01T23:00:00-01:00", 86_400 * SECOND),
    ("1969-12-31T23:59:59.25Z", -750_000_000), ("0001-01-01T00:00:00Z", -62_135_596_800 * SECOND),  # Go's zero time
])  # fmt: skip
def test_a_time_is_parsed_to_the_nanosecond_in_any_zone(text: str, nanoseconds: int) -> None:
    assert reading.parse_time(text) == nanoseconds


@table("text", ["", "2026-11-26", *(f"2026-11-26T{rest}" for rest in (
    "00:00:00", "00:00:00.Z", "00:00:00.1234567890Z", "00:00:00Z\n", "00:00:00+1:00", "00:00:00+25:00", "25:00:00Z"
)), "2026-11-26 00:00:00Z", " 2026-11-26T00:00:00Z", "2026-02-30T00:00:00Z"])  # fmt: skip
def test_a_malformed_time_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        reading.parse_time(text)


@random_inputs
@given(st.integers(0, 253_402_300_800 * SECOND - 1), st.from_regex(reading.TIME, fullmatch=True))
def test_a_time_is_the_same_after_it_was_formatted_and_parsed(nanoseconds: int, text: str) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", reading.format_time(nanoseconds))
    assert reading.parse_time(reading.format_time(nanoseconds)) == nanoseconds
    with suppress(ValueError):  # and no other error
        reading.parse_time(text)


SUBJECTS = [".".join(tokens) for length in range(1, 5) for tokens in product("abc", repeat=length)]
TOKENS = st.lists(st.sampled_from("ab*"), min_size=1, max_size=3).map(".".join)
FILTERS = st.just(">") | st.builds(str.__add__, TOKENS, st.sampled_from(["", ".>"]))


@random_inputs
@given(FILTERS, FILTERS)
def test_two_filters_overlap_if_a_subject_matches_both(one: str, other: str) -> None:
    first, second = (re.escape(text).replace(r"\*", "[^.]+").replace(">", ".+") for text in (one, other))
    overlap = any(re.fullmatch(first, subject) and re.fullmatch(second, subject) for subject in SUBJECTS)
    assert (streams.subjects_overlap(one, other), streams.subjects_overlap(other, one)) == (overlap, overlap)


@table("prefix", ["$JS.ACK", "$JS.ACK.hub.hash", "$JS.ACK._.hash"])
def test_ack_subjects_of_both_versions_are_parsed_and_of_the_first_made(prefix: str) -> None:
    assert acks.parse_ack_subject(f"{prefix}.s.d.2.7.12.3000.5{'.token' * ('_' in prefix)}") == (7, 3000, 12)
    made = Msg(Client(), reply=acks.ack_subject("s", "d", 2, 7, 12, 3 * SECOND)).metadata  # as nats-py reads it
    assert (made.stream, made.consumer, made.num_delivered, made.timestamp.timestamp()) == ("s", "d", 2, 3)
    assert (made.sequence.stream, made.sequence.consumer) == (7, 12)


@table(("check", "accepted", "refused", "what"), [
    (arguments.subject, ["orders.new", "$x.caf\u00e9"], ["", "a b", "a..b", ".a", "a.", "a.*", "a.>", "a*", "a\n"],
     "subject to publish to, such as orders.new"),
    (arguments.subject_filter, ["a.b", "*.new", ">", "a.>"], ["", "a b", "a..b", ">.a", "a*", "a.>b", "a.>.b"],
     "subject filter, such as orders.*"),
    (arguments.stream_name, ["orders_stream", "x" * 255], ["", "a b", "a.b", "a*", ">", "a/b", "a\\b", "x" * 256],
     "name of a stream"),
    (arguments.whole_number(1), ["1", "9" * 18], ["", "0", "-1", "1.5", 5000 * "9"], "whole number of 1 or more"),
    (arguments.whole_number(1, 500), ["1", "500"], ["0", "501"], "whole number from 1 to 500"),
    (arguments.number(0), ["0.0", "1.5"], ["", "-0.1", "nan", "inf", "1e999", "many"], "number of 0 or more"),
    (arguments.number(0, 1), ["0.0", "1.0"], ["-1", "1.01"], "number from 0 to 1"),
])  # fmt: skip
def test_an_argument_is_checked(
    check: Callable[[str], Any], accepted: list[str], refused: list[str], what: str
) -> None:
    assert [str(check(value)) for value in accepted] == accepted
    for value in refused:
        with pytest.raises(ArgumentTypeError) as raised:
            check(value)
        assert str(raised.value) == f"'{printable(value)}' is not a {what}"
    assert not streams.is_name(7)


@table(("data", "shown"), [
    (b"two\nlines\r\n", r"two\nlines\r\n"), ("\x1b[31mred\x07", r"\x1b[31mred\x07"), (b"\xff\xfe", r"\xff\xfe"),
    ("caf\u00e9 \u202etxt".encode(), "caf\u00e9 \\u202etxt"), ("\ud800", r"\ud800"), (b"x" * 200, "x" * 200),
    (b"x" * 201, "x" * 200 + "... (201 in all)"), ("x" * 1000, "x" * 200 + "... (1000 in all)"),
    ("\U0001f600".encode() * 200, "\U0001f600" * 200), (b"\n" * 150, r"\n" * 100 + "... (150 in all)"),
    ("\U0001f600".encode() * 201, "\U0001f600" * 200 + "... (804 in all)"),
], ids=range(11))  # fmt: skip
def test_text_from_outside_becomes_a_harmless_piece_of_a_line(data: bytes | str, shown: str) -> None:
    assert printable(data) == shown


class Untrusted(ssl.SSLCertVerificationError):
    verify_code, verify_message = 20, "no issuer"


@table(("error", "line"), [
    (ValueError("no such\ncustomer"), r"ValueError: no such\ncustomer"), (KeyError(), "KeyError"),
    (type("Odd", (Exception,), {"__str__": lambda self: 1 / 0})(), "Odd"), (TimeoutError(), "timed out"),
    (nats_errors.TimeoutError(), "timed out"), (TimeoutError("not done in 5 s"), "TimeoutError: not done in 5 s"),
    (nats_errors.ConnectionClosedError(), "connection closed"), (ServiceUnavailableError(), "no responders"),
    (nats_errors.ConnectionReconnectingError(), "not connected to the server"),
    (APIError(code=503, err_code=10077, description="maximum bytes exceeded"), "maximum bytes exceeded (10077)"),
    (OSError(f"Multiple exceptions: [Errno 2] Connect call failed {('::1', 1)}, [Errno 2] Connect"), os.strerror(2)),
    (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
    (Untrusted(), "its certificate is not trusted: no issuer (NATS_CA may name its authority)"),
    (ExceptionGroup("", [ExceptionGroup("", [KeyError("a")]), ValueError()]), "KeyError: 'a'"),
])  # fmt: skip
def test_an_error_is_one_line_that_says_what_is_wrong(error: BaseException, line: str) -> None:
    assert describe_error(error) == line


@table(("count", "attempt", "number"), [(97, 2, "2 of 2"), (300, 3, "3")])  # three lines are beside the message's own
async def test_a_users_exception_has_its_traceback_escaped_and_cut(count: int, attempt: int, number: str) -> None:
    async def work(_: Msg) -> None:
        raise ValueError("\n".join(["\x1b[2J", *map(str, range(1, count))]))

    error = await TimeLimit(1).run(work, Msg(Client()))
    assert error
    first, *shown = describe_attempt(error, attempt, 2, 7).split("\n")
    assert first == f": {describe_error(error)} (attempt {number}, stream sequence # 7)"
    assert (shown[0], shown[3]) == ("  Traceback (most recent call last):", r"  ValueError: \x1b[2J")
    assert re.fullmatch(rf'    File "{re.escape(__file__)}", line \d+, in work', shown[1])
    assert [i for i, line in enumerate(shown) if line == "  ..."] == ([MAX_TRACEBACK // 2] if count > 97 else [])
    assert (shown[-1], len(shown)) == (f"  {count - 1}", MAX_TRACEBACK + (count > 97))


def set_environment(patch: pytest.MonkeyPatch, urls: str, credentials: str = "") -> None:
    patch.setenv("NATS_URL", urls)
    patch.setenv("NATS_CREDENTIALS_FILE_PATH", credentials)


@table(("urls", "servers", "options"), [
    ("", [LOCAL], {}), ("a:1/, ,tls://b", ["nats://a:1", "tls://b:4222"], {}), ("[::1]:1", ["nats://[::1]:1"], {}),
    ("me:@a", ["nats://a:4222"], {"user": "me", "password": ""}), ("t%2Cken@a", ["nats://a:4222"], {"token": "t,ken"}),
    ("a,nats://me:1@b,nats://me:1@c,d", [f"nats://{name}:4222" for name in "abcd"], {"user": "me", "password": "1"}),
])  # fmt: skip
def test_servers_and_user_are_the_environments(
    monkeypatch: pytest.MonkeyPatch, urls: str, servers: list[str], options: dict[str, str]
) -> None:
    set_environment(monkeypatch, urls)
    assert read_environment() == (servers, options)


@table("urls", ["nats://", "http://a", "a:port", "a:99999", "[::1", "a\x1b", "a/b", " , ", "me:1@a,nats://you:secret@a",
                *(f"nats://me:12{delimiter}secret@a" for delimiter in "/#?,")])  # fmt: skip
def test_a_malformed_url_is_refused(monkeypatch: pytest.MonkeyPatch, urls: str) -> None:
    set_environment(monkeypatch, urls)
    with pytest.raises(Failure, match=r"^NATS_URL (must be URLs such as|has two users|has no URL) "):
        read_environment()


@random_inputs
@given(*2 * [st.text(st.sampled_from(":/@?#,[]%;&= \x1b"), max_size=4)])
def test_a_password_is_used_as_it_is_and_never_shown(before: str, after: str) -> None:
    password = f"{before}secret{after}"
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, f"nats://me:{quote(password, safe='')}@a:1")
        assert read_environment() == (["nats://a:1"], {"user": "me", "password": password})
        set_environment(patch, f"nats://me:{password}@a:1")
        try:
            shown = str(read_environment()[0])
        except Failure as failure:
            shown = str(failure)
    assert "secret" not in shown


SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
CREDENTIALS = f"---BEGIN JWT---\neyJ.a-b_c\n---END JWT---\n\n---BEGIN SEED---\n{SEED}\n---END SEED---\n"


def test_credentials_are_read_and_name_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "creds").write_text(CREDENTIALS)
    set_environment(monkeypatch, "", str(tmp_path / "creds"))
    servers, options = read_environment()
    assert servers == [f"{SYNADIA_CLOUD}:4222"]
    assert re.findall(r"^[^-\n].*", str(options["user_credentials"]), re.MULTILINE) == ["eyJ.a-b_c", SEED]


@table(("old", "new"), [
    (CREDENTIALS, ""), (CREDENTIALS, "-" * 999), (CREDENTIALS[CREDENTIALS.index("---BEGIN SEED"):], ""),
    ("a-b", "\u00e9"), ("a-b", "\udcff"), ("eyJ", "???"), (SEED, SEED[:-1]), ("", "/dev/zero"), ("", "/missing"),
])  # fmt: skip
def test_malformed_credentials_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str
) -> None:
    file = Path(new) if new.startswith("/") else tmp_path / "creds"
    (tmp_path / "creds").write_text(CREDENTIALS.replace(old, new), errors="surrogateescape")
    set_environment(monkeypatch, "", str(file))
    with pytest.raises(Failure) as raised:
        read_environment()
    malformed = f"{file} is not a credentials file: it needs a user JWT and its seed"
    missing = f"cannot read the credentials file {file}: No such file or directory"
    assert str(raised.value) == (missing if new == "/missing" else malformed)


@random_inputs
@given(st.text("ab\r\n", max_size=30).map(str.encode), st.integers(1, 5), st.sampled_from([1, 3, 64]))
def test_each_line_comes_once_and_no_longer_than_allowed(data: bytes, max_length: int, chunk: int) -> None:
    async def read(path: str) -> list[bytes]:
        return [line async for line in lines.read_lines(path, max_length, asyncio.Event())]

    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        file.write(data)
        file.flush()
        assert asyncio.run(read(file.name)) == [line[: max_length + 1] for line in data.split(b"\n") if line]


async def test_an_empty_line_is_logged_with_its_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "orders").write_bytes(b"one\n\n" + b"x" * 200_000 + b"\n\nfour")
    found = [line async for line in lines.read_lines(str(tmp_path / "orders"), 10, asyncio.Event())]
    assert (found, caplog.messages) == ([b"one", b"x" * 11, b"four"], [f"line {i} is empty: skipped" for i in (2, 4)])


@table(("rest", "ending"), [(b"", "close"), (b"three", "close"), (b"", "shutdown"), (b"three", "shutdown")])
async def test_a_pipe_is_read_as_it_is_written_until_its_end_or_a_shutdown(rest: bytes, ending: str) -> None:
    (reading_end, writing_end), shutdown = os.pipe(), asyncio.Event()
    with os.fdopen(reading_end, "rb"), os.fdopen(writing_end, "wb", 0) as pipe:
        found = lines.read_lines(f"/dev/fd/{reading_end}", 10, shutdown)
        pipe.write(b"one\ntw")
        assert await anext(found) == b"one"
        asyncio.get_running_loop().call_soon(pipe.write, b"o\n" + rest)
        assert await anext(found) == b"two"
        asyncio.get_running_loop().call_soon(pipe.close if ending == "close" else shutdown.set)
        if rest and ending == "shutdown":
            with pytest.raises(Failure, match="stopped: line 3 and what"):
                await anext(found)
        else:
            assert [line async for line in found] == ([rest] if rest else [])


async def test_what_waits_in_a_pipe_at_the_shutdown_is_no_end_of_it() -> None:
    (reading_end, writing_end), shutdown = os.pipe(), asyncio.Event()
    with os.fdopen(reading_end, "rb"), os.fdopen(writing_end, "wb", 0) as pipe:
        found = lines.read_lines(f"/dev/fd/{reading_end}", 10, shutdown)
        pipe.write(b"one\n")
        assert await anext(found) == b"one"
        pipe.write(b"two\n")
        shutdown.set()
        with pytest.raises(Failure, match="stopped: line 2 and what"):
            await anext(found)


@table(
    ("file", "why"), [("/", "Is a directory"), ("\n", "No such file or directory"), ("orders\0", "embedded null byte")]
)
async def test_a_file_that_cannot_be_read_is_named(file: str, why: str) -> None:
    with pytest.raises(Failure, match=f"^cannot read {re.escape(printable(file))}: {why}$"):
        await anext(lines.read_lines(file, 10, asyncio.Event()))


def test_headers_but_instructions_to_the_server_are_kept_to_the_byte() -> None:
    kept = b"NATS/1.0\r\nb: 1\r\na:x:y\r\nB: 2\r\nfolded: one\r\n\ttwo\r\nlatin: \xe9\r\n"
    block = kept.replace(b"a:", b"nats-Rollup: all\r\n folded\r\na:") + b"Nats-Msg-Id: mine\r\n\r\n"
    assert headers.replace_nats_headers(block, {"Nats-Msg-Id": "new"}) == kept + b"Nats-Msg-Id: new\r\n\r\n"
    assert headers.replace_nats_headers(b"", {}) == b"NATS/1.0\r\n\r\n"
    assert headers.read_headers(block)[:3] == [("b", "1"), ("nats-Rollup", "all\r\n folded"), ("a", "x:y")]
    assert headers.read_headers(block)[4:6] == [("folded", "one\r\n\ttwo"), ("latin", r"\xe9")]
    assert [headers.find_header(block, name) for name in ("B", "nats-msg-id", "none")] == ["1", "mine", ""]


def message(sequence: int, data: bytes = b"order-7", header_block: bytes = b"") -> reading.StoredMessage:
    return reading.StoredMessage(sequence, "orders.new", 3 * SECOND, data, header_block, 0.0, 0)


def dead_letter(one: reading.StoredMessage, died_at: int = 0) -> DeadLetter:
    info = {"name": "processor", "config": {}, "created": "", "ts": "", "num_pending": 0, "num_ack_pending": 0}
    info |= {"num_waiting": 0, "delivered": {"stream_seq": 9, "consumer_seq": 12}}
    return DeadLetter("orders_stream", Durable(info, 0), 2, died_at, one)


@table(("sizes", "max_payload", "window"), [
    ([], 2**20, 2), ([None], 2**20, 2), ([0], 2**20, 34), ([0], 1024, 64), ([0, None, 100_000, 5], 2**20, 29),
    ([2**22], 2**20, 1), ([0], 2**26, 1),
])  # fmt: skip
def test_fewer_large_messages_are_read_at_a_time(sizes: list[int | None], max_payload: int, window: int) -> None:
    nc = Client()
    nc._max_payload = max_payload
    assert reading.window_size(nc, [None if size is None else message(1, b"x" * size) for size in sizes]) == window


@table(("attempt", "delay"), [(1, 5), (2, 10), (3, 20), (5, 80), (6, 120), (5000, 120)])
async def test_a_dead_letter_waits_longer_after_each_attempt(attempt: int, delay: int) -> None:
    async def fail(_: Msg) -> None:
        raise ValueError("no such customer")

    nc = Client()
    processing = Processing(
        nc, Verifier(nc, "orders_stream"), fail, TimeLimit(1), asyncio.Event(), Reasons(nc, "orders_stream", "")
    )
    nak = await processing._process(Hint(7, "processor"), dead_letter(message(7)), attempt)
    assert nak == b'-NAK {"delay": %d}' % (delay * SECOND)


def advisory(**changes: object) -> bytes:
    return json.dumps({"stream": "s", "consumer": "c", "stream_seq": 7, "deliveries": 2} | changes).encode()


@table(("second", "died_at"), [("70-01-01T00:00:02", 2), ("70-01-01T00:00:09", 5), ("69-01-01T00:00:00", 0), ("x", 5)])
def test_a_message_died_before_its_advisory_was_stored(second: str, died_at: int) -> None:
    hint = parse_advisory(advisory(timestamp=f"19{second}Z"), "s", 5 * SECOND)
    assert hint == Hint(7, "c", 2, died_at * SECOND)


@table("payload", [
    *(b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, advisory()[:-1] + b', "stream_seq": %s}' % (b"9" * 5000)),
    *(advisory(stream=stream) for stream in ("other", ["s"])),
    *(advisory(consumer=consumer) for consumer in (None, 7, "", "a.b", "*", "a\r\nb", "x" * 256)),
    *(advisory(stream_seq=number) for number in (None, True, 0, -1, 2**64, 7.0, "7")),
    *(advisory(deliveries=number) for number in (None, True, 0, "2")),
], ids=lambda payload: str(payload[:70]))  # fmt: skip
def test_what_is_no_advisory_of_the_stream_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError):
        parse_advisory(payload, "s")


def test_a_dead_letter_is_shown_with_all_that_is_known_of_it() -> None:
    block = b"NATS/1.0\r\na: 1\r\nb: 2\r\na: 3\r\nnats-msg-id: mine\r\n\r\n"
    assert dead_letter(message(7, b"caf\xc3\xa9", block), SECOND).as_json() == {
        **{"sequence": 7, "subject": "orders.new", "published": "1970-01-01T00:00:03.000000000Z", "deliveries": 2},
        **{"died": "1970-01-01T00:00:01.000000000Z", "id": "mine", "payload": "caf\u00e9"},
        "headers": {"a": ["1", "3"], "b": "2", "nats-msg-id": "mine"},
    }
    unknown = dead_letter(message(7, b"\xff\x00")).as_json()
    assert (unknown["died"], unknown["id"], unknown["headers"]) == (None, None, {})
    assert (unknown["payload_base64"], "payload" in unknown) == ("/wA=", False)


@table(("payload", "message_id", "error"), [
    ("text", "1", TypeError), (None, "1", TypeError), (b"order", 7, TypeError), (b"order", b"1", TypeError),
    *((b"order", malformed, ValueError) for malformed in ("", " ", " a", "a ", "a\nb", "a\rb", "\ud800")),
])  # fmt: skip
def test_a_malformed_message_is_refused(payload: bytes, message_id: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Message(payload, message_id).check()


def test_a_message_fits_with_its_header_and_has_a_name_in_one_line() -> None:
    room = Client().max_payload - len("NATS/1.0\r\nNats-Msg-Id: caf\u00e9\r\n\r\n".encode())
    fitting, larger = (Message(b"x" * size, "caf\u00e9") for size in (room, room + 1))
    fitting.check()
    assert (fitting.fits(Client()), larger.fits(Client())) == (True, False)
    assert (str(fitting), str(fitting._replace(label="1\n\x1b[31m"))) == ("caf\u00e9", r"1\n\x1b[31m")


def test_only_a_stored_outcome_is_truthy() -> None:
    assert [outcome for outcome in Outcome if outcome] == [Outcome.STORED]


async def test_each_item_is_done_once_and_only_some_at_a_time() -> None:
    done, most = list[int](), list[int]()

    async def call(number: int) -> None:
        most.append(len(asyncio.all_tasks()))
        await asyncio.sleep(0)
        done.append(number)

    await run_for_each(range(300), call)
    assert (sorted(done), max(most)) == ([*range(300)], AT_A_TIME + 1)


async def test_results_are_in_order_and_the_first_error_cancels_the_others() -> None:
    cancelled = set()

    async def call(number: int) -> int:
        try:
            await (asyncio.sleep(number / 1000) if number < 3 else asyncio.Event().wait())
            return 1 // number
        except asyncio.CancelledError:
            cancelled.add(number)
            raise

    assert await run_all(map(call, (2, 1))) == [0, 1]
    with pytest.raises(ZeroDivisionError):  # in no group
        await run_all(map(call, (3, 0, 4)))
    assert cancelled == {3, 4}


@table("error", [None, ValueError(), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_what_work_raises_is_returned_and_cancels_nothing_after_it(error: BaseException | None) -> None:
    task = asyncio.current_task()
    assert task

    async def work(_: Msg) -> None:
        task.cancel()
        if error:
            raise error

    assert (await TimeLimit(1).run(work, Msg(Client())), task.cancelling()) == (error, 0)
    await asyncio.sleep(0)


@table("is_closed", [False, True])
async def test_work_beyond_the_time_limit_fails_and_at_the_end_its_task_is_cancelled(is_closed: bool) -> None:
    late, in_time = TimeLimit(0), TimeLimit(60)

    async def sleep(_: Msg) -> None:
        await asyncio.sleep(60)

    tasks = [asyncio.create_task(limit.run(sleep, Msg(Client()))) for limit in (late, in_time)]
    await asyncio.sleep(0.001)
    if is_closed:
        late.close()
    assert (late.enforce(), in_time.enforce()) == ([], [])
    (outcome,) = await asyncio.gather(tasks[0], return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError if is_closed else TimeoutError)
    assert not tasks[1].done() and tasks[1].cancel()
    assert isinstance(await tasks[1], asyncio.CancelledError)


async def test_a_task_can_have_a_time_out_after_one_of_its_requests_has_failed() -> None:
    async def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        await run_all([fail(), asyncio.sleep(60)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)


async def test_a_shutdown_at_the_end_of_a_chunk_is_no_end_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "CHUNK", 4)
    (tmp_path / "orders").write_bytes(b"one\ntwo\n")
    shutdown = asyncio.Event()
    found = lines.read_lines(str(tmp_path / "orders"), 10, shutdown)
    assert await anext(found) == b"one"
    shutdown.set()
    with pytest.raises(Failure, match="stopped: line 2 and what"):
        await anext(found)


class AsyncMailer:
    async def __call__(self, order: Msg) -> None: ...


class Mailer:
    def __call__(self, order: Msg) -> None:
        """A plain object."""

    def send(self, order: Msg) -> None:
        """A plain method."""

    async def send_later(self, order: Msg) -> None:
        """A coroutine method."""


def test_work_must_be_a_coroutine_function() -> None:
    mailer = Mailer()
    for plain in (mailer.send, functools.partial(mailer.send), print, mailer, Mailer, None):
        with pytest.raises(TypeError, match="must be a coroutine function"):
            check_work(plain, 1, 1)  # type: ignore[arg-type]
    for wrong in (functools.partial(mailer.send_later, Msg(Client())), Mailer.send_later, lambda: None):
        with pytest.raises(TypeError, match="must take one argument, the message"):
            check_work(wrong, 1, 1)

    @functools.wraps(mailer.send_later)
    def decorated(order: Msg) -> Awaitable[None]:
        return mailer.send_later(order)

    partial = functools.partial(mailer.send_later)
    for work in (mailer.send_later, partial, lambda _: mailer.send_later(_), decorated, AsyncMailer(), AsyncMock()):
        check_work(work, 1, 1, "orders_stream")


@table("backoff", [(), (0.01,), (5, 0), (1, 2, 3), (float("nan"),), (float("inf"),)])
def test_a_back_off_that_nothing_can_keep_is_refused(backoff: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="back-off"):
        make_config("processor", "", backoff, 2, 1000)


@table(
    ("errors", "result"),
    [
        ((Retry("busy", 7),), "busy"),
        ((ExceptionGroup("", [Dead("no")]), Retry()), "no"),
        ((Retry("busy"), ValueError()), "ExceptionGroup"),
    ],
)
async def test_a_task_group_in_the_work_may_raise_what_the_work_may(errors: tuple[Exception, ...], result: str) -> None:
    async def work(_: Msg) -> None:
        raise ExceptionGroup("unhandled errors in a TaskGroup", errors)

    error = await TimeLimit(1).run(work, Msg(Client()))
    assert (str(error) if isinstance(error, Retry | Dead) else type(error).__name__) == result


@table("limits", [(0, 1000), (-5, 1000), (2.5, 1000), (2, 0), (2, 1.5)])
def test_a_limit_that_the_server_would_change_is_refused(limits: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="is a whole number from 1, or -1"):
        make_config("processor", "", [5], *limits)


class OwnRetry(Retry):
    def __init__(self, order: str) -> None:
        self.order = order


def test_a_retry_of_ones_own_needs_no_delay() -> None:
    assert OwnRetry("7").delay is None


async def test_work_with_a_wrong_signature_fails() -> None:
    async def work() -> None: ...

    assert isinstance(await TimeLimit(1).run(work, Msg(Client())), TypeError)  # type: ignore[arg-type]
