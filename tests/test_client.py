"""What jobqueue/connection/client.py overrides in nats-py, and the test of the fault that each override is for."""

from importlib.metadata import version

from nats.aio.client import Client as NatsClient

from jobqueue.connection.client import Client
from tests.harness import ROOT

TESTS = {
    (Client, "_connect_command"): "test_tls_is_wanted_and_the_server_has_none",
    (Client, "_build_message"): "test_orders_that_nats_py_cannot_read_hold_up_no_others",
    (Client, "_process_headers"): "test_orders_that_nats_py_cannot_read_hold_up_no_others",
    (Client, "_process_connect_init"): "test_what_the_server_says_before_it_hangs_up_is_shown",
    (Client, "_send_publish"): "test_headers_are_kept_as_they_are",
    (Client, "_process_err"): "test_a_consumer_whose_credentials_end_uses_the_renewed_file",
    (Client, "_attempt_reconnect"): "test_unsent_bytes_on_a_dead_connection_do_not_hold_up_the_reconnect",
    (Client, "request"): "test_a_subject_that_is_refused_fails_its_requests_and_nothing_else",
}


def test_each_override_has_a_test_and_is_there_in_the_version_that_is_pinned() -> None:
    overrides = {(Client, name) for name in vars(Client) if callable(getattr(NatsClient, name, None))}
    assert {(one, name) for one, name in overrides if name.strip("_") not in ("init", "doc", "module")} == set(TESTS)
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {test}(" in tests for test in TESTS.values())
    assert version("nats-py").startswith("2.16.")
