"""Models and businesses that the tests share: a tiny random Llama, the real SmolLM2, and a folder built on the tiny."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
import transformers
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

from coterie.business import Business, fit
from coterie.model.load import BaseModel, load
from coterie.model.pull import DEFAULT, pull
from support import CHAT_TEMPLATE, train_tokenizer

# `make test` tries the same examples each time, so that it says the same of the same code; `make test-all` explores.
explore = bool(os.environ.get("COTERIE_EXPLORE"))
settings.register_profile("coterie", deadline=None, max_examples=25, derandomize=not explore)
settings.load_profile("coterie")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of the Llama family, as transformers saves it: 2 layers, width 64."""
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
    return load(tiny, torch.float32)


@pytest.fixture(scope="session")
def smol_path() -> Path:
    """Where the real SmolLM2-135M-Instruct lies; pulled where it is absent."""
    return pull(DEFAULT)


@pytest.fixture(scope="session")
def smol(smol_path: Path) -> BaseModel:
    """The real SmolLM2-135M-Instruct, as the product loads it."""
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
    folder = make_shop(tmp_path_factory.mktemp("fitted"), tiny)
    list(fit(Business.open(folder)))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; skips where it cannot be installed."""
    if not shutil.which("chromium") and os.geteuid() == 0:
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=False, capture_output=True)
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the page's tests need Chromium, and `apt-get install chromium` cannot be run here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()
