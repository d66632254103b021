"""The witness: C2SP tlog-witness by its status codes, and by HTTP."""

from __future__ import annotations

import base64
import http.client
import logging.handlers
import queue
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from http import HTTPStatus
from urllib.parse import urlsplit

import pytest

from ledger.errors import InvalidInput, ServerInUse, WitnessUnavailable
from ledger.fetch import fetch
from ledger.merkle import consistency_ranges, leaf_hash, perfect_root, range_hash
from ledger.note import MAX_NOTE_BYTES, Checkpoint, Note, SigningKey, VerifierKey, signers
from ledger.proof import ConsistencyProof
from ledger.service.witness_server import WitnessServer
from ledger.witness import (
    MAX_REQUEST_BYTES,
    Answer,
    Witness,
    WitnessBehind,
    WitnessClient,
    log_path,
)

LOG = SigningKey.generate("acme.example/prod")
COSIGNER = SigningKey.generate("witness.example/w1")
HASH_LINE = base64.b64encode(b"x" * 32) + b"\n"
ORIGIN = "acme.example/prod/t"
HASHES = [leaf_hash(b"%d" % n) for n in range(64)]


def node(one):
    level, index = one
    return perfect_root(HASHES[index << level : (index + 1) << level])


def root(size):
    return range_hash(0, size, node)


def request(old, size, *, key=LOG, origin=ORIGIN, forged=None, proof=None):
    note = Checkpoint(origin, size, forged or root(size)).signed(key)
    hashes = [range_hash(*one, node) for one in consistency_ranges(min(old, size), size)]
    return ConsistencyProof(old, tuple(hashes if proof is None else proof), note)


@pytest.fixture
def witness(tmp_path):
    witness = Witness(COSIGNER, [LOG.verifier()], tmp_path)
    yield witness
    witness.close()


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture
def server(witness):
    with WitnessServer(("127.0.0.1", 0), witness) as server, running(server):
        yield server


def test_a_log_that_grows_is_cosigned(witness):
    """Each continuation gets a cosignature that verifies, and is shown with it."""
    for old, size in ((0, 5), (5, 5), (5, 12), (12, 64)):
        asked = request(old, size)
        answer = witness.answer(asked.encode())
        assert answer.status == HTTPStatus.OK, answer
        whole = Note.parse(asked.note.encode() + answer.body)
        assert [key for key, _ in signers(whole, [witness.verifier])] == [witness.verifier]
        shown = witness.latest(log_path(ORIGIN))
        assert shown.status == HTTPStatus.OK
        assert len(signers(Note.parse(shown.body), [witness.verifier, LOG.verifier(ORIGIN)])) == 2


REFUSED = {
    "an unknown log": (request(0, 5, origin="other.example/t"), HTTPStatus.NOT_FOUND),
    "a log of no tenant": (request(0, 5, origin="acme.example/prod/stale"), HTTPStatus.NOT_FOUND),
    "another key": (request(0, 5, key=SigningKey.generate(LOG.name)), HTTPStatus.FORBIDDEN),
    "an old size beyond the new": (request(9, 6), HTTPStatus.BAD_REQUEST),
    "an old size that is not the last": (request(3, 12), HTTPStatus.CONFLICT),
    "a size before the last": (request(0, 3), HTTPStatus.CONFLICT),
    "another root of the same size": (request(5, 5, forged=b"r" * 32), HTTPStatus.CONFLICT),
    "another history": (request(5, 12, forged=b"r" * 32), HTTPStatus.UNPROCESSABLE_ENTITY),
    "a proof too short": (request(5, 12, proof=[]), HTTPStatus.UNPROCESSABLE_ENTITY),
    "a proof of other hashes": (
        request(5, 12, proof=[b"x" * 32] * 4),
        HTTPStatus.UNPROCESSABLE_ENTITY,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_continue_is_refused_by_its_code(witness, name):
    """Each refusal has the status that the specification gives it, and changes nothing."""
    assert witness.answer(request(0, 5).encode()).status == HTTPStatus.OK
    before = witness.latest(log_path(ORIGIN))
    asked, status = REFUSED[name]
    answer = witness.answer(asked.encode())
    assert answer.status == status
    if status == HTTPStatus.CONFLICT:
        assert (answer.body, answer.content_type) == (b"5\n", "text/x.tlog.size")
    assert witness.latest(log_path(ORIGIN)) == before


def test_a_signature_sent_many_times_is_kept_once(witness):
    """Who sends a public checkpoint's signature line a hundred times cannot end the log."""
    asked = request(0, 5)
    line = asked.note.signatures[0]
    swollen = ConsistencyProof(0, (), Note(asked.note.text, (line,) * 100))
    assert witness.answer(swollen.encode()).status == HTTPStatus.OK
    assert len(Note.parse(witness.latest(log_path(ORIGIN)).body).signatures) == 2
    assert witness.answer(request(5, 7).encode()).status == HTTPStatus.OK


def test_what_could_not_be_read_again_is_not_kept(witness):
    """A note that its cosignature would make too large is refused, and the log goes on."""
    checkpoint = Checkpoint(ORIGIN, 5, root(5), ("x" * 1000,) * 65)
    note = checkpoint.signed(LOG)
    size = len(note.encode())
    note = Checkpoint(
        ORIGIN, 5, root(5), (*checkpoint.extensions, "x" * (MAX_NOTE_BYTES - size - 1))
    ).signed(LOG)
    assert len(note.encode()) == MAX_NOTE_BYTES
    assert witness.answer(ConsistencyProof(0, (), note).encode()).status == HTTPStatus.BAD_REQUEST
    assert witness.answer(request(0, 5).encode()).status == HTTPStatus.OK


MALFORMED = [
    b"",
    b"old\n\n",
    b"old 05\n\n" + request(0, 5).note.encode(),
    b"old 0\n" + request(0, 5).note.encode(),
    b"old 0\n\n" + request(0, 5).note.text,
    b"old 0\n" + HASH_LINE + b"\n",
    b"old 0\n" + HASH_LINE * 64 + b"\n" + request(0, 5).note.encode(),
    bytes(range(256)),
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_requests_are_bad_requests(witness, number):
    """What is no request is answered as one that is malformed, never by a failure."""
    assert witness.answer(MALFORMED[number]).status == HTTPStatus.BAD_REQUEST


def test_memory_outlives_the_process(tmp_path):
    """A witness that starts again knows what it cosigned; two on one directory are refused."""
    key = SigningKey.generate("witness.example/w1")
    first = Witness(key, [LOG.verifier()], tmp_path)
    assert first.answer(request(0, 5).encode()).status == HTTPStatus.OK
    with pytest.raises(ServerInUse):
        Witness(key, [LOG.verifier()], tmp_path)
    first.close()
    again = Witness(key, [LOG.verifier()], tmp_path)
    assert again.answer(request(0, 7).encode()).body == b"5\n"
    assert again.answer(request(5, 7).encode()).status == HTTPStatus.OK
    again.close()


def test_one_of_many_requests_at_once_wins(server, witness):
    """Two histories submitted together from threads: one is cosigned, never both."""
    assert witness.answer(request(0, 5).encode()).status == HTTPStatus.OK
    statuses, start = [], threading.Barrier(8)

    def submit(number):
        start.wait()
        asked = request(5, 6 + number % 4)
        statuses.append(witness.answer(asked.encode()).status)

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses.count(HTTPStatus.OK) == 1
    assert statuses.count(HTTPStatus.CONFLICT) == 7


def test_client_speaks_the_protocol(server, witness):
    """By HTTP the client gets its cosignature, and learns where the witness stands."""
    client = WitnessClient.parse(f"{witness.verifier}@{server.url}/")
    assert client.latest(ORIGIN) is None
    signature = client.add(request(0, 5))
    assert signature.name == "witness.example/w1"
    with pytest.raises(WitnessBehind) as stands:
        client.add(request(0, 12))
    assert stands.value.size == 5
    assert Checkpoint.parse(client.latest(ORIGIN).text).size == 5
    stranger = SigningKey.generate("witness.example/w1").verifier(kind=4)
    with pytest.raises(WitnessUnavailable):
        WitnessClient(stranger, server.url).add(request(5, 6))


def test_http_is_kept_alive_and_bounded(server):
    """One connection serves many requests; bodies too long or without a length are refused."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", log_path("x"), 404),
        ("POST", "/other", 404),
        ("POST", "/add-checkpoint", 400),
    ):
        connection.request(method, path, body=b"x" if method == "POST" else None)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status
    connection.request("POST", "/add-checkpoint", headers={"Content-Length": f"{2**40}"})
    assert connection.getresponse().status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    connection.close()
    with socket.create_connection((place.hostname, place.port), timeout=10) as raw:
        raw.sendall(b"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 411 " in raw.recv(100)
    assert MAX_REQUEST_BYTES < 100_000


def exchanged(server, *parts):
    """All that the server sends on one connection for these bytes, until it ends it."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as raw:
        raw.sendall(b"".join(parts))  # at once, so that none is left unread, which would reset it
        return b"".join(iter(lambda: raw.recv(4096), b""))


POST = b"POST /add-checkpoint HTTP/1.1\r\nHost: x\r\n"
UNSURE = {
    "a length of 5,000 digits": (POST + b"Content-Length: %s\r\n\r\n" % (b"9" * 5000), 400),
    "a signed length": (POST + b"Content-Length: +1\r\n\r\nx", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
    "chunks": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    "a header that is none": (
        b"GET /x HTTP/1.1\r\nBad Header : x\r\nContent-Length: 40\r\n\r\n",
        400,
    ),
    "a header that is none, with a body": (
        POST + b"Bad Header : x\r\nContent-Length: 40\r\n\r\n",
        400,
    ),
    "a first line that continues none": (b"GET /x HTTP/1.1\r\n Content-Length: 26\r\n\r\n", 400),
    "a body where none belongs": (b"GET /x HTTP/1.1\r\nContent-Length: 26\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", UNSURE)
def test_requests_whose_end_is_unsure_are_refused(server, name):
    """What could be read as another request is not read on: one answer, and the end."""
    asked, status = UNSURE[name]
    answer = exchanged(server, asked, b"GET /y HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.count(b"HTTP/1.1") == 1


def drip_until_the_end(connection):
    connection.settimeout(0.02)
    while True:
        try:
            connection.sendall(b"x")
            if connection.recv(1) == b"":
                return
        except TimeoutError:
            continue
        except ConnectionError:
            return


def test_slow_and_many_clients_are_bounded(witness):
    """A client that drips is cut off at its deadline; more than the limit are turned away."""
    with (
        WitnessServer(("127.0.0.1", 0), witness, timeout_s=0.2, max_connections=1) as server,
        running(server),
    ):
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port), timeout=10) as slow:
            slow.sendall(b"GET ")
            assert b" 503 " in exchanged(server)
            drip_until_the_end(slow)
        assert b" 404 " in exchanged(server, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_connection_is_not_kept_for_ever(witness):
    """After its time, the next answer is the last: nobody keeps others out by asking on and on."""
    asked = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with WitnessServer(("127.0.0.1", 0), witness, max_age_s=0) as server, running(server):
        answer = exchanged(server, asked, asked)
    assert answer.count(b"HTTP/1.1 404") == 1
    assert b"Connection: close" in answer


def test_clients_that_go_away_leave_a_line_in_the_log(server, capfd):
    """A reset in the middle of a request is no traceback on the operator's screen."""
    told = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(told)
    log = logging.getLogger("ledger")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port)) as raw:
            raw.sendall(POST + b"Content-Length: 500\r\n\r\nold")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert told.get(timeout=10).getMessage().startswith("witness: 127.0.0.1: ConnectionReset")
    finally:
        log.setLevel(logging.NOTSET)
        log.removeHandler(handler)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nX-", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_answers_have_a_deadline(begin):
    """A witness that drips its headers or its body for ever does not hold who asks it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def drip():
            asking, _ = listening.accept()
            with asking, suppress(OSError):
                asking.sendall(begin)
                while not ended.wait(0.01):
                    asking.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        url = "http://{}:{}/".format(*listening.getsockname())
        try:
            with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
                fetch(url, None, timeout_s=0.2, max_bytes=1 << 20)
        finally:
            ended.set()
            dripping.join()


@pytest.mark.parametrize("before", [b"", b"more text\n\n", b"\n"])
def test_cosignature_is_of_the_note_that_was_sent(server, witness, monkeypatch, before):
    """What an answer has before its signature lines cannot change the text that is verified."""
    client = WitnessClient(witness.verifier, server.url)
    asked = request(0, 5)
    signature = COSIGNER.cosign(asked.note.encode() + before[:-1] if before else asked.note.text, 1)
    answer = Answer(HTTPStatus.OK, before + signature.line().encode())
    monkeypatch.setattr(witness, "answer", lambda _: answer)
    if before:
        with pytest.raises(WitnessUnavailable):
            client.add(asked)
    else:
        assert client.add(asked) == signature


@pytest.mark.parametrize(
    "text",
    ["", "x", "http://h", "KEY@http://h", "key@ftp://h", "key@http://"],
)
def test_witnesses_are_written_as_key_and_url(text):
    """Anything but a witness's key and an http URL is refused with the form to write."""
    with pytest.raises(InvalidInput):
        WitnessClient.parse(text.replace("KEY", str(LOG.verifier())))


def test_a_witnesses_key_is_no_logs(tmp_path):
    """Keys of the two kinds do not stand in for each other."""
    cosigner = LOG.verifier(kind=4)
    assert VerifierKey.parse(str(cosigner)) == cosigner
    with pytest.raises(InvalidInput):
        Witness(LOG, [cosigner], tmp_path)
    with pytest.raises(InvalidInput, match="witness"):
        cosigner.for_log("t")
