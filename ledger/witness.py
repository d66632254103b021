"""C2SP tlog-witness: a small witness, and the client by which a sealer asks one.

A witness remembers, for each log, the latest checkpoint that it cosigned, and cosigns another only
if that continues it. `answer` is the whole of the protocol; the HTTP around it is the service's.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from ledger import keys
from ledger.durable import fsync_directory
from ledger.errors import (
    InvalidInput,
    InvalidSetting,
    NotProved,
    SealRefused,
    ServerInUse,
    WitnessUnavailable,
)
from ledger.fetch import fetch
from ledger.merkle import EMPTY_ROOT, check_consistency
from ledger.note import (
    COSIGNATURE,
    ED25519,
    MAX_NOTE_BYTES,
    Checkpoint,
    Note,
    Signature,
    SigningKey,
    VerifierKey,
    parse_size,
    signers,
)
from ledger.proof import ConsistencyProof

__all__ = ["MAX_REQUEST_BYTES", "Answer", "Witness", "WitnessBehind", "WitnessClient", "log_path"]

MAX_REQUEST_BYTES: Final = MAX_NOTE_BYTES + 64 * 64
SIZE_TYPE: Final = "text/x.tlog.size"
TEXT_TYPE: Final = "text/plain; charset=utf-8"
_TIMEOUT_S: Final = 10.0


class Answer(NamedTuple):
    """An HTTP answer."""

    status: HTTPStatus
    body: bytes = b""
    content_type: str = TEXT_TYPE


def log_path(origin: str) -> str:
    """Where a witness shows a log's latest checkpoint: the path of tlog-mirror's monitoring API,
    `/<SHA-256 of the origin in hex>/checkpoint`.
    """
    return f"/{hashlib.sha256(origin.encode()).hexdigest()}/checkpoint"


class Witness:
    """A witness's memory in a directory, which it holds alone. Threads may share it."""

    def __init__(self, key: SigningKey, logs: Sequence[VerifierKey], directory: Path) -> None:
        """`logs`: keys of logs, or of deployments, for all of whose tenants' logs they count.

        Raises:
            InvalidInput: one of `logs` is a witness's key.
            InvalidSetting: there is no such directory.
            ServerInUse: another witness has it.
        """
        self._key = key
        self._logs = tuple(one.of_kind(ED25519) for one in logs)
        self._directory = directory
        self._one = threading.Lock()
        if not directory.is_dir():
            raise InvalidSetting(f"witness: there is no directory {directory}", hint="create it")
        self._held = (directory / "lock").open("ab")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            raise ServerInUse(f"another witness runs on {directory}") from None

    def close(self) -> None:
        """Lets go of the directory."""
        self._held.close()

    @property
    def verifier(self) -> VerifierKey:
        """What others verify its cosignatures with."""
        return self._key.verifier(kind=COSIGNATURE)

    def latest(self, path: str) -> Answer:
        """The latest checkpoint under a `log_path`, with its cosignature."""
        name = path.strip("/").removesuffix("/checkpoint")
        if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            return Answer(HTTPStatus.NOT_FOUND)
        try:
            return Answer(HTTPStatus.OK, self._file(name).read_bytes())
        except FileNotFoundError:
            return Answer(HTTPStatus.NOT_FOUND)

    def answer(self, body: bytes) -> Answer:
        """The answer to an add-checkpoint request."""
        try:
            asked = ConsistencyProof.parse(body)
            checkpoint = Checkpoint.parse(asked.note.text)
        except NotProved as error:
            return _refusal(HTTPStatus.BAD_REQUEST, error.message)
        trusted = self._keys_of(checkpoint.origin)
        if not trusted:
            return _refusal(HTTPStatus.NOT_FOUND, "this log is not witnessed here")
        try:
            signed = signers(asked.note, trusted)
        except NotProved as error:
            return _refusal(HTTPStatus.FORBIDDEN, error.message)
        if asked.old > checkpoint.size:
            return _refusal(HTTPStatus.BAD_REQUEST, "the old size is larger than the checkpoint's")
        with self._one:
            return self._continue(asked, checkpoint, [signature for _, signature in signed])

    def _keys_of(self, origin: str) -> list[VerifierKey]:
        deployment, _, tenant = origin.rpartition("/")
        named = [key for key in self._logs if key.name == origin]
        if keys.is_tenant(tenant):
            named += [key.named(origin) for key in self._logs if key.name == deployment]
        return named

    def _continue(
        self, asked: ConsistencyProof, checkpoint: Checkpoint, by_log: list[Signature]
    ) -> Answer:
        name = hashlib.sha256(checkpoint.origin.encode()).hexdigest()
        before = self._known(name)
        size, root = (before.size, before.root) if before else (0, EMPTY_ROOT)
        conflict = Answer(HTTPStatus.CONFLICT, b"%d\n" % size, SIZE_TYPE)
        if asked.old != size or (checkpoint.size == size and checkpoint.root != root):
            return conflict
        try:
            check_consistency(size, checkpoint.size, root, checkpoint.root, asked.hashes)
        except NotProved as error:
            return _refusal(HTTPStatus.UNPROCESSABLE_ENTITY, error.message)
        cosignature = self._key.cosign(asked.note.text, int(time.time()))
        kept = Note(asked.note.text, (*by_log, cosignature)).encode()
        try:
            Note.parse(kept)  # what could not be read again would end the log here
        except NotProved as error:
            return _refusal(HTTPStatus.BAD_REQUEST, f"with its cosignature: {error.message}")
        _replace(self._file(name), kept)
        return Answer(HTTPStatus.OK, cosignature.line().encode())

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.checkpoint"

    def _known(self, name: str) -> Checkpoint | None:
        path = self._file(name)
        return Checkpoint.parse(Note.parse(path.read_bytes()).text) if path.exists() else None


def _refusal(status: HTTPStatus, why: str) -> Answer:
    return Answer(status, f"{why}\n".encode(errors="replace"))


def _replace(path: Path, content: bytes) -> None:
    """Puts the file there whole or not at all, on disk when this returns."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


# -- the client --------------------------------------------------------------------------------


class WitnessBehind(Exception):
    """The witness's latest checkpoint has this size; a proof must begin there."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class WitnessClient:
    """One witness, by its key and the URL in front of `/add-checkpoint`."""

    def __init__(self, key: VerifierKey, url: str) -> None:
        self.key = key
        self.url = url.rstrip("/")

    @classmethod
    def parse(cls, text: str) -> WitnessClient:
        """From `VKEY@URL`.

        Raises:
            InvalidInput: it is not in this form.
        """
        key, _, rest = text.partition("@http")
        url = f"http{rest}"
        if not rest or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise InvalidInput(
                f"witness: {text[:200]!r} is no witness", hint="write VKEY@https://host/prefix"
            )
        return cls(VerifierKey.parse(key).of_kind(COSIGNATURE), url)

    def add(self, proof: ConsistencyProof) -> Signature:
        """The witness's cosignature; blocks.

        Raises:
            WitnessBehind: it wants a proof from another size.
            SealRefused: it has seen another tree, or does not know the log.
            WitnessUnavailable: it does not answer, or not as the protocol says.
        """
        status, body = self._ask("/add-checkpoint", proof.encode())
        if status == HTTPStatus.CONFLICT:
            try:
                size = parse_size(body.decode(errors="replace").strip(), "witness")
            except NotProved as error:
                raise self._unavailable(error.message) from None
            if size == proof.old:
                raise self._refused("it has cosigned another root of this size", "split-view")
            raise WitnessBehind(size)
        if status == HTTPStatus.UNPROCESSABLE_ENTITY:
            raise self._refused("what it has seen is not the beginning of this", "split-view")
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN, HTTPStatus.BAD_REQUEST):
            raise self._unavailable(f"{status}: {body[:200].decode(errors='replace').strip()}")
        return self._cosignature(proof.note, body)

    def _cosignature(self, note: Note, body: bytes) -> Signature:
        lines = body.decode(errors="replace").removesuffix("\n").split("\n")
        try:
            cosigned = Note(note.text, tuple(map(Signature.parse, lines)))
            ((_, signature), *_) = signers(cosigned, [self.key])
        except NotProved as error:
            raise self._unavailable(error.message) from None
        return signature

    def latest(self, origin: str) -> Note | None:
        """The latest checkpoint that it shows; None where it knows no such log; blocks.

        Raises:
            WitnessUnavailable: it does not answer.
            NotProved: what it answers is no signed note.
        """
        status, body = self._ask(log_path(origin), None)
        return None if status == HTTPStatus.NOT_FOUND else Note.parse(body)

    def _ask(self, path: str, body: bytes | None) -> tuple[int, bytes]:

        try:
            status, answer = fetch(
                self.url + path, body, timeout_s=_TIMEOUT_S, max_bytes=MAX_REQUEST_BYTES
            )
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._unavailable(str(error)) from None
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise self._unavailable(f"it answers {status}")
        return status, answer

    def _unavailable(self, why: str) -> WitnessUnavailable:
        return WitnessUnavailable(f"witness {self.key.name} at {self.url}: {why}")

    def _refused(self, why: str, reason: str) -> SealRefused:
        return SealRefused(
            f"witness {self.key.name} at {self.url}: {why}",
            hint="this ledger, or its anchor, is not what it was: compare with govledger verify",
            reason=reason,
        )
