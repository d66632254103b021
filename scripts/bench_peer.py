"""The peer that the projector is measured against: the `eventsourcing` library, on SQLite.

Its ProjectionRunner needs a recorder with subscriptions, which SQLite's has not
(NotImplementedError in 9.5.6), so what runs is its follower, `ProcessApplication.pull_and_process`,
which keeps its tracking with each event that it handles. It needs the dependency group `bench`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
from eventsourcing.application import Application, ProcessingEvent
from eventsourcing.domain import DomainEvent, datetime_now_with_tzinfo
from eventsourcing.system import ProcessApplication

__all__ = ["peer_rate"]


class Recorded(DomainEvent):  # type: ignore[misc]
    """A shipped event, whole."""

    verdict: str
    data: str


class Verdicts(ProcessApplication[Any]):
    """The least that a projection can do: it counts verdicts."""

    def __init__(self, env: dict[str, str]) -> None:
        super().__init__(env=env)
        self.counts: dict[str, int] = {}

    def policy(self, event: Recorded, processing_event: ProcessingEvent[Any]) -> None:
        self.counts[event.verdict] = self.counts.get(event.verdict, 0) + 1
        kept = Recorded(
            originator_id=uuid4(),
            originator_version=1,
            timestamp=event.timestamp,
            verdict=event.verdict,
            data="",
        )
        processing_event.collect_events(kept)


def peer_rate(lines: Sequence[bytes]) -> float:
    """Events a second of the peer's follower, from recorded to its view."""
    events = [orjson.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        of = {"PERSISTENCE_MODULE": "eventsourcing.sqlite"}
        recorder: Application[Any] = Application(
            env={**of, "SQLITE_DBNAME": str(Path(folder) / "record.db")}
        )
        now = datetime_now_with_tzinfo()
        for start in range(0, len(events), 500):
            recorder.save(
                *[
                    Recorded(
                        originator_id=uuid4(),
                        originator_version=1,
                        timestamp=now,
                        verdict=event.get("verdict", ""),
                        data=orjson.dumps(event).decode(),
                    )
                    for event in events[start : start + 500]
                ]
            )
        follower = Verdicts({**of, "SQLITE_DBNAME": str(Path(folder) / "view.db")})
        follower.follow("Application", recorder.notification_log)
        begin_s = time.perf_counter()
        follower.pull_and_process("Application")
        took_s = time.perf_counter() - begin_s
        assert sum(follower.counts.values()) == len(events)
    return len(events) / took_s
