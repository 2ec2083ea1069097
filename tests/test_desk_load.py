"""A server that is killed with -9 under load loses no message that it has accepted, and doubles none."""

import asyncio
from pathlib import Path

import pytest
from desk_load import check, killer, load, make_business, running, scripted_server


@pytest.mark.slow
def test_two_kills_under_load_lose_and_double_no_accepted_message(tmp_path: Path, tiny: Path) -> None:
    folder = make_business(tmp_path / "shop", str(tiny))
    with running(scripted_server(folder, token_s=0.005, lease_s=4.0)) as server:
        found = asyncio.run(load(server, 12, 0, 0.3, 60.0, killer(server, 2, 1.5)))
    check(folder, found)
    assert sum(v.broken for v in found.visitors) > 0, "no kill has struck anybody"
    assert found.accepted > 24
    assert (found.lost, found.doubled, found.disordered, found.answers_doubled) == (0, 0, 0, 0)
    assert all(v.unanswered == 0 for v in found.visitors), "what was owed at a kill is answered after it"
