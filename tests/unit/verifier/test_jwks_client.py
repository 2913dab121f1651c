"""The cached key set against a real HTTP server that behaves as it is told (TRIALS J4, J13).

It must not reach beyond loopback.
"""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from keys.verifier import JWKSClient, KeysUnavailable, discover, encode_jwks, thumbprint
from keys.verifier.fetch import FetchFailed, get, post
from keys.verifier.jwks_client import FETCH_TIMEOUT


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class KeyServer:
    """Publishes what it is told to, how it is told to, and counts who asks."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.status = 200
        self.headers: Mapping[str, str] = {}
        self.released = threading.Event()
        self.released.set()
        self.requests = 0
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                answers.requests += 1
                answers.released.wait(10)
                self.send_response(answers.status)
                headers = {"Content-Length": str(len(answers.body)), **answers.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                # Who has read enough hangs up.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(answers.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks.json"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(rsa_key: RSAPrivateKey) -> Generator[KeyServer]:
    server = KeyServer(encode_jwks([rsa_key.public_key()]))
    yield server
    server.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(server: KeyServer, clock: Clock) -> JWKSClient:
    return JWKSClient(server.url, clock=clock, timeout=2)


@pytest.fixture
def kid(rsa_key: RSAPrivateKey) -> str:
    return thumbprint(rsa_key.public_key())


@pytest.fixture
def new_kid(other_key: RSAPrivateKey) -> str:
    return thumbprint(other_key.public_key())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 5 s"
        time.sleep(0.005)


def test_known_kids_cost_one_fetch_however_many_ask_at_once(
    server: KeyServer, client: JWKSClient, kid: str
) -> None:
    server.released.clear()
    with ThreadPoolExecutor(32) as threads:
        asked = [threads.submit(client.keys_for, kid) for _ in range(32)]
        eventually(lambda: server.requests == 1)
        server.released.set()
        assert all(kid in each.result() for each in asked)
    assert server.requests == 1
    assert client.stats() == {
        "fetches": 1,
        "fetch_failures": 0,
        "unknown_kid": 0,
        "refused_stale": 0,
        "keys": 1,
        "age_seconds": 0,
    }


def test_j13_10000_unknown_kids_cause_one_fetch_a_second(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    for number in range(10_000):
        clock.now += 0.001
        assert f"unknown-{number}" not in client.keys_for(f"unknown-{number}")
        assert kid in client.keys_for(kid)
    assert 9 <= server.requests <= 11
    assert client.stats()["unknown_kid"] == 10_000


def test_j13_10000_unknown_kids_at_once_cause_one_fetch_a_second(
    server: KeyServer, kid: str
) -> None:
    client = JWKSClient(server.url)
    started = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(client.keys_for, (f"unknown-{number}" for number in range(10_000))))
    assert server.requests <= 1 + (time.monotonic() - started)
    assert kid in client.keys_for(kid)


@pytest.mark.parametrize("in_error", [False, True])
def test_j13_a_key_published_after_a_failed_lookup_becomes_usable(
    in_error: bool,
    server: KeyServer,
    client: JWKSClient,
    clock: Clock,
    rsa_key: RSAPrivateKey,
    other_key: RSAPrivateKey,
    new_kid: str,
) -> None:
    client.keys_for(new_kid)
    server.status = 500 if in_error else 200
    for _ in range(150):
        clock.now += 1.5
        assert new_kid not in client.keys_for(new_kid)
    server.status = 200
    server.body = encode_jwks([rsa_key.public_key(), other_key.public_key()])
    clock.now += 10 if in_error else 1
    assert new_kid in client.keys_for(new_kid)


def test_who_cannot_fetch_past_max_age_cannot_tell_that_a_key_does_not_exist(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str, new_kid: str
) -> None:
    client.keys_for(kid)
    server.status = 500
    clock.now += 299
    assert new_kid not in client.keys_for(new_kid)
    clock.now += 11
    with pytest.raises(KeysUnavailable):
        client.keys_for(new_kid)
    assert kid in client.keys_for(kid)


def test_j13_failed_fetches_are_repeated_ever_more_slowly_up_to_10_s(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    client.keys_for(kid)
    server.status = 503
    asked_at: list[float] = []
    for _ in range(600):
        clock.now += 0.1
        before = server.requests
        client.keys_for("unknown")
        if server.requests > before:
            asked_at.append(clock.now)
    pauses = [round(later - sooner) for sooner, later in itertools.pairwise(asked_at)]
    assert pauses == [1, 2, 4, 8, 10, 10, 10, 10]


BAD_ANSWERS: dict[str, tuple[int, bytes | None, Mapping[str, str]]] = {
    "500": (500, None, {}),
    "404": (404, None, {}),
    "204": (204, b"", {}),
    "redirect": (302, None, {"Location": "/jwks.json?again"}),
    "empty set": (200, b'{"keys":[]}', {}),
    "login page": (200, b"<html>", {}),
    "cut short": (200, None, {"Content-Length": "100000"}),
    "compressed": (200, b"\x1f\x8b\x08", {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize(
    ("status", "body", "headers"), BAD_ANSWERS.values(), ids=BAD_ANSWERS.keys()
)
def test_j13_a_failed_fetch_never_empties_the_cache(
    status: int,
    body: bytes | None,
    headers: Mapping[str, str],
    server: KeyServer,
    client: JWKSClient,
    clock: Clock,
    kid: str,
) -> None:
    client.keys_for(kid)
    server.status, server.headers = status, headers
    server.body = server.body if body is None else body
    for _ in range(3):
        clock.now += 301
        assert kid in client.keys_for(kid)
        eventually(lambda: client.stats()["fetches"] == client.stats()["fetch_failures"] + 1)
    assert client.stats()["fetch_failures"] == 3
    assert client.stats()["age_seconds"] == 903


def test_j13_keys_are_used_two_hours_beyond_their_freshness_and_then_refused(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    client.keys_for(kid)
    server.status = 500
    clock.now += 300 + 7199
    assert kid in client.keys_for(kid)
    clock.now += 1
    with pytest.raises(KeysUnavailable, match="expected status 200, found 500") as refused:
        client.keys_for(kid)
    assert 1 <= refused.value.retry_after <= 10
    assert client.stats()["refused_stale"] == 1
    server.status = 200
    clock.now += refused.value.retry_after
    assert kid in client.keys_for(kid)
    assert client.stats()["age_seconds"] == 0


def test_a_server_that_is_away_at_first_is_found_later(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    server.status = 503
    with pytest.raises(KeysUnavailable):
        client.keys_for(kid)
    assert client.stats()["age_seconds"] == float("inf")
    server.status = 200
    with pytest.raises(KeysUnavailable) as refused:
        client.keys_for(kid)
    assert server.requests == 1
    clock.now += refused.value.retry_after
    assert kid in client.keys_for(kid)


def test_nobody_waits_while_a_set_near_its_end_is_fetched_anew(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    client.keys_for(kid)
    clock.now += 241
    server.released.clear()
    started = time.monotonic()
    for _ in range(100):
        assert kid in client.keys_for(kid)
    assert time.monotonic() - started < FETCH_TIMEOUT / 2
    eventually(lambda: server.requests == 2)
    assert client.stats()["age_seconds"] == 241
    server.released.set()
    eventually(lambda: client.stats()["age_seconds"] == 0)


def test_nobody_waits_for_a_server_in_error_while_a_set_is_usable(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    client.keys_for(kid)
    server.status = 500
    clock.now += 301
    client.keys_for(kid)
    server.released.clear()
    clock.now += 60
    started = time.monotonic()
    for _ in range(100):
        assert kid in client.keys_for(kid)
    assert time.monotonic() - started < FETCH_TIMEOUT / 2
    eventually(lambda: server.requests == 3)


@pytest.mark.parametrize("after_an_error", [False, True])
def test_an_idle_service_does_not_accept_a_key_that_was_withdrawn_meanwhile(
    after_an_error: bool,
    server: KeyServer,
    client: JWKSClient,
    clock: Clock,
    kid: str,
    other_key: RSAPrivateKey,
) -> None:
    client.keys_for(kid)
    if after_an_error:
        server.status = 500
        clock.now += 301
        client.keys_for(kid)
        server.status = 200
        clock.now += 10
        client.keys_for("unknown")
    server.body = encode_jwks([other_key.public_key()])
    clock.now += 3600
    assert kid not in client.keys_for(kid)


@pytest.mark.parametrize(
    ("headers", "fresh_for"),
    [
        ({}, 300),
        ({"Cache-Control": "public, max-age=600"}, 600),
        ({"Cache-Control": "Max-Age=600"}, 600),
        ({"Cache-Control": "s-maxage=600"}, 300),
        ({"Cache-Control": "max-age=600", "Age": "200"}, 400),
        ({"Cache-Control": "max-age=0"}, 10),
        ({"Cache-Control": "max-age=-1"}, 300),
        ({"Cache-Control": "no-store"}, 10),
        ({"Cache-Control": "max-age=9999999"}, 86_400),
        ({"Cache-Control": "max-age=" + "9" * 5000}, 300),
    ],
)
def test_a_set_is_fresh_for_its_max_age_within_bounds(
    headers: Mapping[str, str],
    fresh_for: int,
    server: KeyServer,
    client: JWKSClient,
    clock: Clock,
    kid: str,
) -> None:
    server.headers = headers
    client.keys_for(kid)
    clock.now += fresh_for * 0.8 - 0.5
    client.keys_for(kid)
    assert client.stats()["fetches"] == 1
    clock.now += 1
    client.keys_for(kid)
    assert client.stats()["fetches"] == 2


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "data:application/json,{}", "ftp://127.0.0.1/", "//127.0.0.1/", ""),
        *("http://tokens.example.com/jwks", "http://127.0.0.1.example.com/", "http://0.0.0.0/"),
        *("https://user:pass@tokens.example.com/", "https://", "https://tokens.example.com:99999/"),
        *("https://tokens.example.com/ HTTP/1.1", "https://tokens.example.com/\r\nX: 1"),
        *("https://tokens.example.com/#keys", "https://t\N{CYRILLIC SMALL LETTER O}kens.example"),
    ],
)
def test_j4_only_https_and_loopback_are_asked(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        JWKSClient(url)


@pytest.mark.parametrize("url", ["http://localhost:1/", "http://[::1]:1/", "http://127.8.8.8:1/"])
def test_loopback_may_be_asked_without_tls(url: str) -> None:
    JWKSClient(url)
    with pytest.raises(FetchFailed, match="Error"):
        get(url, timeout=1)


def test_j4_neither_a_redirect_nor_a_proxy_leads_elsewhere(
    server: KeyServer, client: JWKSClient, kid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        elsewhere = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", elsewhere)
        monkeypatch.setenv("ALL_PROXY", elsewhere)
        server.status, server.headers = 307, {"Location": f"{elsewhere}/jwks.json"}
        with pytest.raises(KeysUnavailable, match="expected status 200, found 307"):
            client.keys_for(kid)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_body_of_more_than_1_mib_is_not_read(server: KeyServer) -> None:
    server.body = b" " * 1024 * 1024
    assert get(server.url, timeout=2).body == server.body
    server.body += b" "
    with pytest.raises(FetchFailed, match="at most 1048576 bytes"):
        get(server.url, timeout=2)


def test_a_post_is_answered_by_whoever_was_asked_and_nobody_else() -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            # It answers before the body has come, and hangs up.
            connection.sendall(
                b"HTTP/1.1 307 X\r\nLocation: https://elsewhere.example.com/\r\n"
                b"Retry-After: 7\r\nContent-Length: 2\r\n\r\n{}"
            )
            connection.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        found = post(
            f"http://127.0.0.1:{listener.getsockname()[1]}/",
            b"x" * 4_000_000,
            content_type="text/plain",
            authorization="Bearer secret",
            timeout=2,
        )
        thread.join()
    assert (found.status, found.body, found.retry_after) == (307, b"{}", 7)


def test_a_failed_post_tells_no_secret(server: KeyServer) -> None:
    for url in ("http://127.0.0.1:1/", server.url):
        server.headers = {"Content-Length": "100000"}
        with pytest.raises(FetchFailed) as failed:
            post(url, b"secret", content_type="a/b", authorization="Bearer secret", timeout=1)
        assert "secret" not in str(failed.value)
    with pytest.raises(ValueError, match="expected https"):
        post("http://a.example.com/", b"", content_type="a/b", authorization="", timeout=1)


def test_a_server_that_drips_is_cut_off() -> None:
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                if stop.wait(0.02):
                    return
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        started = time.monotonic()
        with pytest.raises(FetchFailed, match=r"within 0\.3 s|closed"):
            get(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.3)
        assert time.monotonic() - started < 10  # all of it takes twenty
        stop.set()
        thread.join()


def test_a_server_that_says_nothing_keeps_nobody_longer_than_the_timeout(
    server: KeyServer, clock: Clock, kid: str
) -> None:
    client = JWKSClient(server.url, clock=clock, timeout=0.2)
    server.released.clear()
    started = time.monotonic()
    with pytest.raises(KeysUnavailable):
        client.keys_for(kid)
    assert time.monotonic() - started < FETCH_TIMEOUT


def test_a_fetch_that_never_ends_is_given_up_and_its_answer_counts_no_more(
    server: KeyServer, clock: Clock, kid: str, new_kid: str, other_key: RSAPrivateKey
) -> None:
    resolved = threading.Event()
    asked: list[float] = []

    def find_out() -> str:
        asked.append(clock.now)
        if len(asked) == 1:
            resolved.wait(10)
        return server.url

    client = JWKSClient(find_out, clock=clock, timeout=0.2)
    for pause in (0, 59):
        clock.now += pause
        with pytest.raises(KeysUnavailable, match="no fetch has ended"):
            client.keys_for(kid)
    assert len(asked) == 1
    clock.now += 1
    assert kid in client.keys_for(kid)
    server.body = encode_jwks([other_key.public_key()])
    resolved.set()
    eventually(lambda: server.requests == 2)
    time.sleep(0.05)
    assert new_kid not in client.keys_for(kid)


@pytest.mark.anyio
async def test_the_event_loop_runs_on_while_keys_are_fetched(
    server: KeyServer, client: JWKSClient, kid: str
) -> None:
    server.released.clear()
    found: list[bool] = []

    async def ask() -> None:
        found.append(kid in await client.keys_for_async(kid))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(ask)
            with anyio.fail_after(0.5):
                for _ in range(20):
                    await anyio.sleep(0.001)
            assert not found
            server.released.set()
    assert found == [True] * 200
    assert server.requests == 1


@pytest.mark.anyio
async def test_one_who_gives_up_does_not_take_the_keys_from_the_others(
    server: KeyServer, client: JWKSClient, kid: str
) -> None:
    server.released.clear()
    with anyio.move_on_after(0.05) as gave_up:
        await client.keys_for_async(kid)
    assert gave_up.cancelled_caught
    server.released.set()
    with anyio.fail_after(5):
        assert kid in await client.keys_for_async(kid)
    assert server.requests == 1


def test_the_kids_at_hand_are_named_as_long_as_they_are_usable(
    server: KeyServer, client: JWKSClient, clock: Clock, kid: str
) -> None:
    loaded: list[frozenset[str]] = []
    client.when_loaded(lambda: loaded.append(client.kids))
    assert client.kids == frozenset()
    assert client.refresh()
    assert client.kids == {kid}
    eventually(lambda: loaded == [{kid}])
    assert not client.refresh()  # within a second
    clock.now += 300 + 7199
    server.status = 500
    assert not client.refresh()
    assert client.kids == {kid}
    clock.now += 1
    assert client.kids == frozenset()
    assert len(loaded) == 1


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="max_stale"):
        JWKSClient("https://tokens.example.com/jwks", max_stale=-1)
    with pytest.raises(ValueError, match="timeout"):
        JWKSClient("https://tokens.example.com/jwks", timeout=0)


def test_discovery_believes_only_the_issuers_own_document(
    serve: Callable[[Mapping[str, bytes]], str],
) -> None:
    path = "/.well-known/oauth-authorization-server"
    documents: dict[str, bytes] = {}
    issuer = serve(documents)
    for document, reason in (
        (None, "status 200, found 404"),
        ("[]", "JSON object"),
        ('{"issuer":"ISSUER/","jwks_uri":"ISSUER/jwks"}', "found another"),
        ('{"jwks_uri":"ISSUER/jwks"}', "found another"),
        ('{"issuer":"ISSUER"}', "jwks_uri, a string"),
        ('{"issuer":"ISSUER","jwks_uri":"file:///etc/passwd"}', "expected an https URL"),
        ('{"issuer":"x","issuer":"ISSUER","jwks_uri":"ISSUER/jwks"}', "duplicate"),
    ):
        if document is not None:
            documents[path] = document.replace("ISSUER", issuer).encode()
        with pytest.raises(FetchFailed, match=reason):
            discover(issuer)
    documents[path] = f'{{"issuer":"{issuer}","jwks_uri":"{issuer}/keys"}}'.encode()
    assert discover(issuer) == f"{issuer}/keys"
