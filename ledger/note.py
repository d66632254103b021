"""Signed notes, keys, checkpoints and cosignatures, as C2SP specifies them: pure, without I/O.

signed-note@v1.0.0, tlog-checkpoint@v1.0.0 and tlog-cosignature@v1.0.1, Ed25519 alone. Keys are
written as Go's golang.org/x/mod/sumdb/note does:

    <name>+<8 hex digits of the key id>+base64(type ‖ 32 bytes public key)               to verify
    PRIVATE+KEY+<name>+<8 hex digits of the key id>+base64(0x01 ‖ 32 bytes secret seed)   to sign

A deployment has one key, and signs for each tenant under the tenant's origin: the key of
`acme.example/prod` signs the log `acme.example/prod/<tenant>` under just that name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ledger import keys
from ledger.errors import InvalidInput, NotProved
from ledger.merkle import HASH_BYTES, MAX_SIZE

__all__ = [
    "COSIGNATURE",
    "ED25519",
    "MAX_NOTE_BYTES",
    "Checkpoint",
    "Handover",
    "Note",
    "Signature",
    "SigningKey",
    "VerifierKey",
    "b64",
    "checked_hash",
    "cosigned_text",
    "origin_of",
    "parse_size",
    "signers",
]

ED25519: Final = 0x01
COSIGNATURE: Final = 0x04
MAX_NOTE_BYTES: Final = 64 * 1024
MAX_SIGNATURES: Final = 100
MAX_NAME_BYTES: Final = 255
MAX_DEPLOYMENT_BYTES: Final = 255 - len("%2F.checkpoints") - 64
"""Percent-encoded: a log's file is called so, with a tenant of up to 64 characters."""

_PUBLIC_BYTES: Final = 32
_KEY_ID_BYTES: Final = 4
_TIME_BYTES: Final = 8
_DASH: Final = "— "
_HANDOVER: Final = "govledger/key-handover@1"
_DEPLOYMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,126}[A-Za-z0-9]|[A-Za-z0-9]")


def b64(raw: bytes) -> str:
    """Standard Base 64 of RFC 4648 §4, as all of C2SP's formats have it."""
    return base64.b64encode(raw).decode()


def _malformed(why: str) -> NotProved:
    return NotProved(why, reason="malformed")


def _unb64(text: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _malformed(f"{what}: no base64") from None
    if b64(raw) != text:  # one text for one value: else a byte could be flipped unnoticed
        raise _malformed(f"{what}: no canonical base64")
    return raw


def checked_hash(text: str, what: str) -> bytes:
    """A base64 SHA-256.

    Raises:
        NotProved: it is none.
    """
    raw = _unb64(text, what)
    if len(raw) != HASH_BYTES:
        raise _malformed(f"{what}: {len(raw)} bytes are no SHA-256")
    return raw


def parse_size(text: str, what: str) -> int:
    """A tree size or leaf index: ASCII decimal without leading zeroes, below 2**63.

    Raises:
        NotProved: it is none.
    """
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", text) or int(text) > MAX_SIZE:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise _malformed(f"{what}: {shown!r} is no size")
    return int(text)


def _is_name(name: str) -> bool:
    return 0 < len(name.encode()) <= MAX_NAME_BYTES and not any(
        char.isspace() or char == "+" or char < " " for char in name
    )


def origin_of(deployment: str, tenant: str) -> str:
    """The log's name: `<deployment>/<tenant>`.

    Raises:
        InvalidInput: the deployment ends with the tenant's name, so the two could be confused.
    """
    keys.checked_tenant(tenant)
    if deployment.rpartition("/")[2] == tenant:
        raise InvalidInput(
            f"tenant: {tenant} is also the last part of the deployment's name {deployment}",
            hint="make the deployment a key of another name",
        )
    return f"{deployment}/{tenant}"


def checked_deployment(name: str) -> str:
    """`name` itself where a deployment can be called so.

    Raises:
        InvalidInput: it cannot.
    """
    if not _DEPLOYMENT.fullmatch(name):
        raise InvalidInput(
            f"deployment: {ascii(name)[:80]} is no name",
            hint="1 to 128 characters of A-Z a-z 0-9 . _ - /, such as acme.example/prod",
        )
    if len(name) + 2 * name.count("/") > MAX_DEPLOYMENT_BYTES:
        raise InvalidInput(
            f"deployment: {name[:80]} is too long for the names of its logs' files, where each / "
            f"counts as 3 of at most {MAX_DEPLOYMENT_BYTES} bytes",
            hint="take fewer parts, such as acme.example/prod",
        )
    return name


# -- keys --------------------------------------------------------------------------------------


def _key_id(name: str, kind: int, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:_KEY_ID_BYTES]


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A name and a public key; `kind` is 1 for a log's signatures, 4 for a witness's."""

    name: str
    public: bytes
    kind: int = ED25519

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """From `<name>+<key id>+<base64>`.

        Raises:
            InvalidInput: it is no such key, or of another algorithm.
        """
        name, _, rest = text.strip().partition("+")
        key_id, _, encoded = rest.partition("+")
        try:
            raw = _unb64(encoded, "key")
        except NotProved:
            raw = b""
        kind, public = raw[:1], raw[1:]
        good = _is_name(name) and kind in (b"\x01", b"\x04") and len(public) == _PUBLIC_BYTES
        if not good or _key_id(name, kind[0], public).hex() != key_id.lower():
            raise InvalidInput(
                f"key: {text.strip()[:120]!r} is no Ed25519 verifier key",
                hint="write it as `govledger keys show` prints it: name+12345678+base64",
            )
        return cls(name, public, kind[0])

    @property
    def key_id(self) -> bytes:
        """The first four bytes of SHA-256(name ‖ newline ‖ kind ‖ public key)."""
        return _key_id(self.name, self.kind, self.public)

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{b64(bytes([self.kind]) + self.public)}"

    def named(self, name: str) -> VerifierKey:
        """The same key under another name."""
        return VerifierKey(name, self.public, self.kind)

    def of_kind(self, kind: int) -> VerifierKey:
        """Itself, where it is what is asked for: a log's key (`ED25519`) or a witness's.

        Raises:
            InvalidInput: it is the other: neither stands in for the other.
        """
        if self.kind != kind:
            is_witness = self.kind == COSIGNATURE
            raise InvalidInput(
                f"key: {self} is {'a witness' if is_witness else 'a log'}'s, and "
                f"{'a log' if is_witness else 'a witness'}'s is asked for",
                hint="--key takes a log's, --witness-key what `keys show --witness` prints",
            )
        return self

    def for_log(self, tenant: str) -> VerifierKey:
        """The key of a tenant's log: itself, or that of the deployment under the log's name.

        Raises:
            InvalidInput: it is a witness's key.
        """
        self.of_kind(ED25519)
        if self.name.endswith(f"/{keys.checked_tenant(tenant)}"):
            return self
        return self.named(origin_of(self.name, tenant))

    def matches(self, signature: Signature) -> bool:
        """Whether the signature says that it is by this key."""
        return signature.name == self.name and signature.key_id == self.key_id

    def verifies(self, text: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's over a note's text."""
        if self.kind == COSIGNATURE:
            if len(signature) <= _TIME_BYTES:
                return False
            time_s = int.from_bytes(signature[:_TIME_BYTES], "big")
            text, signature = cosigned_text(text, time_s), signature[_TIME_BYTES:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text)
        except (InvalidSignature, ValueError):
            return False
        return True


def cosigned_text(text: bytes, time_s: int) -> bytes:
    """What a cosignature signs: tlog-cosignature, Ed25519 signed message."""
    return b"cosignature/v1\ntime %d\n%b" % (time_s, text)


class SigningKey:
    """A deployment's or a witness's secret; its `repr` does not show it."""

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self.name = name
        self._private = private

    @classmethod
    def generate(cls, name: str) -> SigningKey:
        """A new key from the system's randomness.

        Raises:
            InvalidInput: nothing can be called so.
        """
        return cls(checked_deployment(name), Ed25519PrivateKey.generate())

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """From `PRIVATE+KEY+<name>+<key id>+<base64>`.

        Raises:
            InvalidInput: it is no such key; the message does not show what it is.
        """
        parts = text.strip().split("+", 4)
        try:
            raw = _unb64(parts[4], "key") if len(parts) == 5 else b""
        except NotProved:
            raw = b""
        if parts[:2] != ["PRIVATE", "KEY"] or len(raw) != 33 or raw[0] != ED25519:
            raise InvalidInput(
                "signing key: this is no Ed25519 note key",
                hint="govledger keys new --deployment NAME -o FILE makes one",
            )
        key = cls(parts[2], Ed25519PrivateKey.from_private_bytes(raw[1:]))
        if not _is_name(key.name) or key.verifier().key_id.hex() != parts[3].lower():
            raise InvalidInput("signing key: its key id does not fit it: it was damaged")
        return key

    def encode(self) -> str:
        """The secret as text: what a key file has."""
        seed = self._private.private_bytes_raw()
        key_id = self.verifier().key_id.hex()
        return f"PRIVATE+KEY+{self.name}+{key_id}+{b64(bytes([ED25519]) + seed)}"

    def __repr__(self) -> str:
        return f"SigningKey({self.name})"

    def verifier(self, name: str | None = None, kind: int = ED25519) -> VerifierKey:
        """What others verify with."""
        return VerifierKey(name or self.name, self._private.public_key().public_bytes_raw(), kind)

    def sign(self, text: bytes, name: str | None = None) -> Signature:
        """A note's signature, under `name` where it is not the key's own."""
        key = self.verifier(name)
        return Signature(key.name, key.key_id + self._private.sign(text))

    def cosign(self, text: bytes, time_s: int) -> Signature:
        """A witness's signature over a checkpoint's text at a POSIX time."""
        key = self.verifier(kind=COSIGNATURE)
        signature = self._private.sign(cosigned_text(text, time_s))
        return Signature(key.name, key.key_id + time_s.to_bytes(_TIME_BYTES, "big") + signature)


# -- notes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature line: who says that it signed, and key id ‖ signature."""

    name: str
    raw: bytes

    @property
    def key_id(self) -> bytes:
        """Of the key that it says it is by."""
        return self.raw[:_KEY_ID_BYTES]

    @property
    def time_s(self) -> int:
        """When a cosignature was made, in s since 1970."""
        return int.from_bytes(self.raw[_KEY_ID_BYTES : _KEY_ID_BYTES + _TIME_BYTES], "big")

    def line(self) -> str:
        """The line with its newline."""
        return f"{_DASH}{self.name} {b64(self.raw)}\n"

    @classmethod
    def parse(cls, line: str) -> Signature:
        """From a line without its newline.

        Raises:
            NotProved: it is none.
        """
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        if not line.startswith(_DASH) or not _is_name(name):
            raise _malformed(f"{line[:60]!r} is no signature line")
        raw = _unb64(encoded, "signature")
        if len(raw) <= _KEY_ID_BYTES:
            raise _malformed("a signature is shorter than its key id")
        return cls(name, raw)


@dataclass(frozen=True, slots=True)
class Note:
    """A text that ends in a newline, and who says that it signed it."""

    text: bytes
    signatures: tuple[Signature, ...]

    @classmethod
    def parse(cls, raw: bytes) -> Note:
        """From its bytes; nothing about the signatures is verified.

        Raises:
            NotProved: it is no signed note: `unsigned` where only the signatures are missing.
        """
        if len(raw) > MAX_NOTE_BYTES:
            raise _malformed(f"a note of {len(raw)} bytes; at most {MAX_NOTE_BYTES} are read")
        try:
            whole = raw.decode()
        except UnicodeDecodeError:
            raise _malformed("the note is no UTF-8") from None
        if any(char < " " and char != "\n" for char in whole):
            raise _malformed("the note has control characters")
        text, blank, signed = whole.rpartition("\n\n")
        if not blank or not signed:
            raise NotProved("the note is not signed", reason="unsigned")
        if not signed.endswith("\n"):
            raise _malformed("the note does not end in a newline")
        lines = signed[:-1].split("\n")
        if len(lines) > MAX_SIGNATURES:
            raise _malformed(f"{len(lines)} signatures; at most {MAX_SIGNATURES} are read")
        return cls(text.encode() + b"\n", tuple(map(Signature.parse, lines)))

    def encode(self) -> bytes:
        """The note's bytes."""
        return self.text + b"\n" + "".join(one.line() for one in self.signatures).encode()

    def with_signatures(self, more: Iterable[Signature]) -> Note:
        """The note with those of `more` that it does not have yet."""
        new = [one for one in more if one not in self.signatures]
        return Note(self.text, (*self.signatures, *new))


def signers(note: Note, trusted: Sequence[VerifierKey]) -> list[tuple[VerifierKey, Signature]]:
    """The trusted keys that signed the note, each once; unknown ones are ignored.

    Raises:
        NotProved: a trusted key's signature does not fit the text, or none is by a trusted key.
    """
    found: dict[VerifierKey, Signature] = {}
    for signature in note.signatures:
        for key in trusted:
            if not key.matches(signature):
                continue
            if not key.verifies(note.text, signature.raw[_KEY_ID_BYTES:]):
                raise NotProved(f"the signature of {key} does not fit", reason="bad-signature")
            found.setdefault(key, signature)  # the same line may stand there a hundred times
    if not found:
        named = ", ".join(f"{one.name}+{one.key_id.hex()}" for one in note.signatures)
        raise NotProved(
            f"no signature is by {' or '.join(map(str, trusted)) or 'a trusted key'}: "
            f"there is {named[:300]}",
            reason="foreign-signature",
        )
    return list(found.items())


# -- checkpoints -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's name, its size, and the root of the tree over its leaves."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: bytes) -> Checkpoint:
        """From a note's text.

        Raises:
            NotProved: it is no checkpoint.
        """
        lines = text.decode(errors="replace").removesuffix("\n").split("\n")
        if len(lines) < 3 or not all(lines):
            raise _malformed("a checkpoint has at least three lines, and no empty one")
        size = parse_size(lines[1], "checkpoint")
        return cls(lines[0], size, checked_hash(lines[2], "root hash"), tuple(lines[3:]))

    def text(self) -> bytes:
        """The note's text."""
        lines = (self.origin, str(self.size), b64(self.root), *self.extensions)
        return "".join(f"{line}\n" for line in lines).encode()

    def signed(self, key: SigningKey) -> Note:
        """The note, signed under the log's name."""
        text = self.text()
        return Note(text, (key.sign(text, self.origin),))


@dataclass(frozen=True, slots=True)
class Handover:
    """One key names the next: a note that both sign; `at` is the last checkpoint of the old one."""

    FIRST_LINE: ClassVar[bytes] = f"{_HANDOVER}\n".encode()

    at: Checkpoint
    old: VerifierKey
    new: VerifierKey

    @staticmethod
    def is_one(note: Note) -> bool:
        """Whether the note says that it is a hand-over."""
        return note.text.startswith(Handover.FIRST_LINE)

    @classmethod
    def parse(cls, note: Note) -> Handover:
        """From a note that both keys have signed.

        Raises:
            NotProved: it is none, or one of the two has not.
        """
        lines = note.text.decode(errors="replace").removesuffix("\n").split("\n")
        if len(lines) != 6 or lines[0] != _HANDOVER:
            raise _malformed("a hand-over has six lines")
        at = Checkpoint.parse("".join(f"{line}\n" for line in lines[1:4]).encode())
        try:
            old, new = VerifierKey.parse(lines[4]), VerifierKey.parse(lines[5])
        except InvalidInput as error:
            raise _malformed(f"hand-over: {error.message}") from None
        if {old.name, new.name} != {at.origin} or old.kind != ED25519 or new.kind != ED25519:
            raise _malformed(f"hand-over: its keys are not those of the log {at.origin}")
        if {key for key, _ in signers(note, [old, new])} != {old, new}:
            raise NotProved("a hand-over must be signed by both keys", reason="unsigned")
        return cls(at, old, new)

    @classmethod
    def signed(cls, at: Checkpoint, old: SigningKey, new: SigningKey) -> Note:
        """The note by which `new` takes the log over."""
        origin = at.origin
        lines = [_HANDOVER, origin, str(at.size), b64(at.root)]
        lines += [str(old.verifier(origin)), str(new.verifier(origin))]
        text = "".join(f"{line}\n" for line in lines).encode()
        return Note(text, (old.sign(text, origin), new.sign(text, origin)))
