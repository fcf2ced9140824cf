"""What jobqueue/client.py overrides in nats-py, and the test of the fault that each override is for."""

from importlib.metadata import version

from nats.aio.client import Client as NatsClient

from jobqueue.client import Client
from tests.harness import ROOT

TESTS = {
    "_connect_command": "test_a_tls_url_and_a_server_without_tls",
    "request": "test_a_subject_that_the_user_may_not_publish_to",
    "_build_message": "test_orders_that_nats_py_cannot_read_hold_up_no_others",
    "_process_headers": "test_orders_that_nats_py_cannot_read_hold_up_no_others",
    "_process_err": "test_a_consumer_whose_credentials_end_uses_the_renewed_file",
    "_attempt_reconnect": "test_unsent_bytes_on_a_dead_connection_do_not_hold_up_the_reconnect",
}


def test_each_override_has_a_test_and_is_there_in_the_version_that_is_pinned() -> None:
    overridden = {name for name, value in vars(Client).items() if callable(value)}
    assert overridden == set(TESTS)
    assert all(hasattr(NatsClient, name) for name in overridden)
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert all(f"def {test}(" in tests for test in TESTS.values())
    assert version("nats-py").startswith("2.16.")
