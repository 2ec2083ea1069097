"""What is older than its rule allows goes by itself: once whoever serves, after restarts too, and on record."""

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coterie.business import Business
from coterie.cli.main import app
from coterie.config import RetentionSpec
from coterie.desk import rights
from coterie.desk.conversation import Conversations
from coterie.desk.retention import JOB, RetentionTask, run_due
from coterie.desk.rights import house_of, rooms_of
from coterie.errors import CoterieError, Stopped
from coterie.privacy.house import House
from coterie.privacy.rights import Noted, Room
from coterie.store.database import writing
from coterie.store.job import LEASE_S, failures, take

DAY = 86400.0
SPEC = RetentionSpec(days={"conversations": 30}, every_hours=24)


@pytest.fixture
def shop(tmp_path: Path) -> Business:
    (tmp_path / "coterie.toml").write_text("[retention]\ndays = { conversations = 30 }\n")
    return Business.open(tmp_path)


@pytest.fixture
def house(shop: Business) -> Iterator[House]:
    opened = house_of(shop)
    yield opened
    opened.close()


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def talks(house: House, count: int, at: float, resolved: bool = True) -> None:
    """Conversations that were last touched `at`."""
    desk = Conversations(house.database, house.seal, house.unseal, clock=lambda: at)
    for n in range(count):
        id = desk.open(f"c{n}-{at}").id
        desk.say(id, "My card number is 4111 1111 1111 1111")
        if resolved:
            desk.take(id, "eve")
            desk.resolve(id, "eve")


def left(house: House) -> int:
    return len(Conversations(house.database, house.seal, house.unseal).listed(limit=10_000))


def lines(house: House) -> list[int]:
    return [line.detail["deleted"] for line in house.audit.lines(actor="retention", limit=10_000)]


def test_what_is_old_and_resolved_goes_once_a_day_and_is_on_record(house: House, shop: Business) -> None:
    clock = Clock(100 * DAY)
    talks(house, 3, 69 * DAY)
    talks(house, 2, 69 * DAY, resolved=False)
    talks(house, 4, 75 * DAY)
    rooms = rooms_of(house, shop)
    assert run_due(house.database, SPEC, rooms, house.audit, clock) == {"conversations": 3}
    assert (left(house), lines(house)) == (6, [3])
    clock.now += 23 * 3600
    assert run_due(house.database, SPEC, rooms, house.audit, clock) is None, "it is not a day yet"
    clock.now += 2 * 3600
    assert run_due(house.database, SPEC, rooms, house.audit, clock) == {"conversations": 0}
    assert lines(house) == [3], "nothing was deleted, and nothing said"
    clock.now += 10 * DAY  # nobody served meanwhile
    assert run_due(house.database, SPEC, rooms, house.audit, clock) == {"conversations": 4}
    house.audit.verify()


def test_many_go_part_by_part(house: House, shop: Business, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "EXPIRED_AT_ONCE", 4)
    talks(house, 10, 1 * DAY)
    done = run_due(house.database, SPEC, rooms_of(house, shop), house.audit, Clock(100 * DAY))
    assert (done, sorted(lines(house)), left(house)) == ({"conversations": 10}, [2, 4, 4], 0)


def test_of_several_workers_one_runs_it(house: House, shop: Business) -> None:
    talks(house, 20, 1 * DAY)
    clock, found = Clock(100 * DAY), list[dict[str, int] | None]()
    start, houses = threading.Barrier(6, timeout=20), [house_of(shop) for _ in range(6)]

    def work(mine: House) -> None:
        start.wait()
        found.append(run_due(mine.database, SPEC, rooms_of(mine, shop), mine.audit, clock))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in houses]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for mine in houses:
        mine.close()
    assert (found.count(None), found.count({"conversations": 20})) == (5, 1)
    assert lines(house) == [20]


def test_a_worker_that_is_killed_midway_is_followed_by_another(house: House, shop: Business, tmp_path: Path) -> None:
    talks(house, 6, 1 * DAY)
    code = """
        import os, sys
        from pathlib import Path
        from coterie.business import Business
        from coterie.desk import rights
        from coterie.desk.retention import run_due
        rights.EXPIRED_AT_ONCE = 2
        business = Business.open(Path(sys.argv[1]))
        house = rights.house_of(business)
        room = next(r for r in rights.rooms_of(house, business) if r.name == "conversations")
        parts = []
        def expire(before, noted):
            if parts:
                os.kill(os.getpid(), 9)
            parts.append(1)
            return room.expire(before, noted)
        from dataclasses import replace
        run_due(house.database, business.config.retention, [replace(room, expire=expire)], house.audit,
                lambda: 100 * 86400.0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(shop.folder)], check=False)
    assert done.returncode == -9
    assert (left(house), lines(house)) == (4, [2]), "what is gone is on record, and what is not is there"
    clock, rooms = Clock(100 * DAY + 1), rooms_of(house, shop)
    assert run_due(house.database, SPEC, rooms, house.audit, clock) is None, "it may still be at it"
    clock.now += LEASE_S
    assert run_due(house.database, SPEC, rooms, house.audit, clock) == {"conversations": 4}
    assert (left(house), sum(lines(house))) == (0, 6)


def test_a_worker_that_was_taken_for_dead_deletes_nothing_more(house: House, shop: Business) -> None:
    talks(house, 2, 1 * DAY)
    clock = Clock(100 * DAY)
    slow = take(house.database, JOB, clock)
    clock.now += LEASE_S + 1
    assert slow
    assert take(house.database, JOB, clock)
    (room,) = (r for r in rooms_of(house, shop) if r.name == "conversations")
    assert room.expire
    with pytest.raises(Stopped):
        room.expire(99 * DAY, lambda session, _: slow.hold(session))
    assert left(house) == 2
    slow.end(clock.now + DAY)
    with pytest.raises(Stopped), writing(house.database) as session:
        slow.hold(session)


def test_a_room_that_fails_is_tried_again_later_and_later(house: House) -> None:
    clock = Clock(100 * DAY)

    def fails(_before: float, _noted: Noted) -> int:
        raise OSError("the disk is full")

    rooms = [Room("conversations", lambda c: [], lambda c: 0, fails)]
    for wait in (60, 120, 240):
        with pytest.raises(OSError, match="full"):
            run_due(house.database, SPEC, rooms, house.audit, clock)
        clock.now += wait - 1
        assert run_due(house.database, SPEC, rooms, house.audit, clock) is None
        clock.now += 1
    assert failures(house.database, JOB) == 3
    works: Callable[[float, Noted], int] = lambda _before, _noted: 0  # noqa: E731
    rooms = [Room("conversations", lambda c: [], lambda c: 0, works)]
    assert run_due(house.database, SPEC, rooms, house.audit, clock) == {"conversations": 0}
    assert failures(house.database, JOB) == 0


def test_the_task_runs_by_itself_and_refuses_a_rule_that_fits_no_room(house: House, shop: Business) -> None:
    ran, rooms = threading.Event(), rooms_of(house, shop)

    def expire(_before: float, noted: Noted) -> int:
        if ran.is_set():
            return 0
        with writing(house.database) as session:
            noted(session, 1)
        ran.set()
        return 1

    task = RetentionTask(house.database, SPEC, [Room("conversations", list, int, expire)], house.audit, look_s=0.01)
    task.start()
    assert ran.wait(20)
    task.close()
    assert lines(house) == [1]
    with pytest.raises(CoterieError, match="'letters' keeps nothing that expires; there are: consents, conversations"):
        RetentionTask(house.database, RetentionSpec(days={"letters": 3}), rooms, house.audit)


@pytest.mark.parametrize(
    ("declared", "arguments", "says"),
    [
        ("[retention]\ndays = { conversations = 30 }", [], "conversations"),
        ("", [], "declares no days"), ("[retention]\ndays = { conversations = 0 }", [], "greater than 0"),
        ("[retention]\ndays = { letters = 3 }", [], "'letters' keeps nothing"), ("", ["conversations"], "not a rule"),
    ],
)  # fmt: skip
def test_by_hand_it_follows_the_declaration(tmp_path: Path, declared: str, arguments: list[str], says: str) -> None:
    (tmp_path / "coterie.toml").write_text(declared + "\n")
    done = CliRunner().invoke(app, ["customers", "retain", *arguments, "--folder", str(tmp_path)])
    assert says in (done.output + str(done.exception))
