"""A fit on the real model, killed at ten random moments, ends in the same weights, bit for bit. Slow: minutes."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from coterie.business import Business

KILLS = 10
FIT = """
    import functools, sys
    from coterie import learn
    from coterie.cli.main import main

    learn.Training = functools.partial(learn.Training, checkpoint_every_s=0.5)
    main(["fit", sys.argv[1]])
"""


def make(folder: Path, base: Path) -> Path:
    """A business with one expert that lives in the upper layers, and one in all."""
    folder.mkdir()
    ends = [("broken", "refund"), ("late", "sorry")]
    rows = [f"Order {n} has come {ends[n % 2][0]}.,{ends[n % 2][1]}" for n in range(240)]
    (folder / "rows.csv").write_text("prompt,completion\n" + "\n".join(rows) + "\n")
    training = "training = { epochs = 2, batch = 4, held_out = 0.1"
    (folder / "coterie.toml").write_text(
        f'[business]\nbase = "{base}"\ncontext = 128\nslots = 4\n'
        f'[experts.whole]\ntrain = "rows.csv"\n{training} }}\n'
        f'[experts.branch]\ntrain = "rows.csv"\n{training}, first_layer = 15 }}\n'
    )
    return folder


def run(folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", textwrap.dedent(FIT), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)


def weights(folder: Path) -> dict[str, bytes]:
    library = Business.open(folder).library
    return {n: (library.folder(n) / "adapter_model.safetensors").read_bytes() for n in library.names()}


@pytest.mark.slow
def test_a_fit_of_the_real_model_killed_at_ten_random_moments_ends_in_the_same_weights(
    smol_path: Path, tmp_path: Path
) -> None:
    unbroken, killed = make(tmp_path / "unbroken", smol_path), make(tmp_path / "killed", smol_path)
    assert run(unbroken).wait() == 0
    done = 0
    while done < KILLS:
        process = run(killed)
        try:
            process.wait(random.uniform(4, 8))  # seconds; loading takes about three
            raise AssertionError(f"it was over after {done} kills: {process.stderr and process.stderr.read()!r}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
    assert run(killed).wait() == 0
    assert weights(killed) == weights(unbroken)
    assert sorted(weights(killed)) == ["branch", "whole"]
