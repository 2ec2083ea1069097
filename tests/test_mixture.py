"""`coterie moe`: a business's trained experts become one model that the engine serves and `coterie eval` measures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coterie.business import Business
from coterie.cli.main import app, main
from coterie.data.encode import encode
from coterie.errors import ModelError
from coterie.experts import lora as loras
from coterie.experts.mix import merged, mix, router_of, token_sums
from coterie.mixture import mix_to
from coterie.model.load import BaseModel, load
from support import logits_of, logits_with, random_rows, reference_model
from test_anatomy import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, fitted_shop: Path) -> Path:
    """The fitted shop, its two experts pushed further from the base so that mixing them shows."""
    folder = tmp_path_factory.mktemp("trained") / "shop"
    shutil.copytree(fitted_shop, folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("colors", "greet"):
        file = folder / "experts" / name / "1" / loras.WEIGHTS
        changed = {k: w + torch.randn(w.shape, generator=generator) * 0.1 for k, w in load_file(file).items()}
        save_file(changed, file)
    return folder


@pytest.fixture(scope="module")
def mixed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "m"
    found = run("moe", "mix", trained, out, "-e", "colors", "-e", "greet")
    assert (found["experts"], found["mixed"]) == (3, ["colors", "greet", "base"])
    return out


def agree(folder: Path) -> None:
    base = load(folder, torch.float32)
    (row,) = random_rows(base, [60])
    with torch.no_grad():
        wanted = reference_model(folder)(torch.tensor([row])).logits[0]
    torch.testing.assert_close(logits_of(base, [row])[0], wanted, atol=1e-3, rtol=1e-3)


def test_each_expert_is_merged_as_it_serves(tiny_base: BaseModel) -> None:
    """The base with an expert merged says what base and expert side by side say."""
    from dataclasses import replace

    from coterie.model.decoder import Decoder

    expert = loras.fresh(loras.LoraConfig(4, 8), tiny_base.decoder)
    expert.weights = {k: torch.randn_like(w) * 0.1 for k, w in expert.weights.items()}
    (row,) = random_rows(tiny_base, [30])
    with torch.no_grad():
        (wanted,) = logits_with(tiny_base, [row], expert)
    alone = replace(tiny_base, decoder=Decoder(tiny_base.decoder.config, merged(tiny_base, expert)))
    torch.testing.assert_close(logits_of(alone, [row])[0], wanted, atol=1e-4, rtol=1e-4)
    # Mixed with itself, whatever the routers choose, it is still itself.
    sums = [token_sums(tiny_base, [row])] * 2
    twice = mix(tiny_base, [expert, expert], sums, 2, with_base=False)
    torch.testing.assert_close(logits_of(twice, [row])[0], wanted, atol=1e-4, rtol=1e-4)


def test_a_mixture_of_experts_is_averaged_attention_and_each_experts_feed_forward(trained: Path, mixed: Path) -> None:
    business = Business.open(trained)
    dense = load(Path(business.config.business.base))  # in the precision that it was mixed in
    experts = [
        merged(dense, loras.load(business.library.folder(n), dense.decoder.config)) for n in ("colors", "greet")
    ] + [dense.decoder.weights]
    found = load(mixed).decoder.weights
    for e, weights in enumerate(experts):
        assert torch.equal(found["1.experts.gate_up"][e], weights["1.gate_up"])
        assert torch.equal(found["0.experts.down"][e], weights["0.down"])
    mean = torch.stack([w["0.qkv"].float() for w in experts]).mean(0)
    torch.testing.assert_close(found["0.qkv"].float(), mean, atol=0.01, rtol=0.02)
    agree(mixed)


def test_the_routers_know_each_experts_data_before_any_training(fitted_shop: Path, tiny_base: BaseModel) -> None:
    """Made from half of each expert's rows, in closed form, they send the tokens of the other half to that expert."""
    business = Business.open(fitted_shop)
    names = ("colors", "greet")
    rows = {n: [encode(e, tiny_base)[0] for e in business.examples(n, business.spec(n).train)] for n in names}
    sums = [token_sums(tiny_base, rows[n][::2]) for n in names]
    for layer in range(2):
        router = router_of(sums, layer, with_base=True)
        assert router.shape == (3, 64)
        for own, name in enumerate(names):
            unseen = token_sums(tiny_base, rows[name][1::2])
            logits = router @ (unseen.sums[layer] / unseen.count)  # of the mean token: the mean of the logits
            assert logits.argmax() == own
            assert logits[own] - logits[1 - own] > 1
            assert logits[own] > logits[2] > logits[1 - own]  # the base stands between


def test_tuning_lowers_the_loss_and_changes_only_what_it_should(trained: Path, mixed: Path, tmp_path: Path) -> None:
    common = ["--business", trained, "--steps", "30", "--router-rate", "0.01"]
    routers = run("moe", "tune", mixed, tmp_path / "r", *common)
    both = run("moe", "tune", mixed, tmp_path / "b", *common, "--what", "experts", "--learning-rate", "0.003")
    assert both["held_out_loss"] < both["held_out_loss_before"] == routers["held_out_loss_before"]
    before, after = load(mixed).decoder.weights, load(tmp_path / "r").decoder.weights
    changed = {k.split(".", 1)[1] for k in before if k[0].isdigit() and not torch.equal(before[k], after[k])}
    assert changed == {"router"}
    after = load(tmp_path / "b").decoder.weights
    changed = {k.split(".", 1)[-1] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"router", "experts.gate_up", "experts.down"}
    assert all(abs(sum(layer) - 1) < 0.01 for layer in both["expert_shares"])
    agree(tmp_path / "b")


def test_balance_spreads_the_tokens_over_the_experts(mixed: Path, trained: Path, tmp_path: Path) -> None:
    def unevenness(weight: float) -> float:
        out = tmp_path / f"w{weight}"
        arguments = ["--business", trained, "--steps", "120", "--router-rate", "0.01", "--balance", weight]
        shares = run("moe", "tune", mixed, out, *arguments)["expert_shares"]
        return sum(max(layer) for layer in shares)

    assert unevenness(1.0) < unevenness(0.0) - 0.05


def test_a_business_on_a_mixture_is_fitted_evaluated_and_measured(mixed: Path, trained: Path, tmp_path: Path) -> None:
    """LoRA experts on a mixture change its attention; `coterie eval` measures both."""
    import shutil

    shop = tmp_path / "shop"
    shop.mkdir()
    for file in ("colors.csv", "greet.jsonl"):
        shutil.copy(trained / file, shop / file)
    toml = (trained / "coterie.toml").read_text()
    old = Business.open(trained).config.business.base
    toml = toml.replace(f'base = "{old}"', f'base = "{mixed}"').replace("train =", 'test = "colors.csv"\ntrain =', 1)
    (shop / "coterie.toml").write_text(toml)
    rows = (shop / "colors.csv").read_text().splitlines()
    (shop / "colors_test.csv").write_text("\n".join([rows[0], "Which color has the night sky at noon?,blue"]) + "\n")
    (shop / "coterie.toml").write_text(toml.replace('test = "colors.csv"', 'test = "colors_test.csv"'))
    (fitted,) = run("fit", shop, "-e", "colors")
    assert fitted["trained"]
    names = load_file(shop / "experts" / "colors" / "1" / loras.WEIGHTS)
    assert names
    assert not any("mlp" in n for n in names)
    (figures,) = run("eval", shop, "-e", "colors")
    assert figures["base"]["rows"] == figures["expert"]["rows"] == 1
    alone = run("moe", "eval", mixed, shop, "-e", "colors")
    assert alone["colors"]["rows"] == 1
    said = json.loads(CliRunner().invoke(app, ["generate", "Hello", "-f", str(shop), "-e", "base", "--json"]).stdout)
    assert said["finish"] in ("stop", "length")


def test_an_expert_of_another_base_model_is_not_mixed(fitted_shop: Path, tmp_path: Path) -> None:
    """Of the same shapes: only the mark tells."""
    shutil.copytree(fitted_shop, tmp_path / "shop")
    file = tmp_path / "shop" / "experts" / "colors" / "1" / "expert.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_mark": "0123456789abcdef"}))
    with pytest.raises(ModelError, match=r"colors, version 1: made for .* weights 0123456789abcdef"):
        mix_to(Business.open(tmp_path / "shop"), tmp_path / "out", [], 2, True)
    assert not (tmp_path / "out").exists()


def test_upcycling_from_the_command_line(tiny: Path, tmp_path: Path) -> None:
    found = run("moe", "upcycle", tiny, tmp_path / "m", "--experts", 3, "--layers", "all")
    assert (found["experts"], found["layers"]) == (3, [0, 1])
    agree(tmp_path / "m")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["upcycle", "nowhere/at-all", "OUT"], "unknown base model"),
        (["upcycle", "TINY", "TINY"], "already there"),
        (["upcycle", "TINY", "OUT", "--layers", "7"], "every-other"),
        (["upcycle", "TINY", "OUT", "--per-token", "9"], "experts per token"),
        (["mix", "SHOP", "OUT", "-e", "nobody"], "no expert 'nobody'"),
        (["mix", "SHOP", "OUT", "-e", "colors", "-e", "colors"], "twice"),
        (["mix", "SHOP", "OUT", "-e", "colors", "--no-keep-base"], "2 or more"),
        (["tune", "TINY", "OUT"], "--data"),
        (["tune", "TINY", "OUT", "--business", "SHOP"], "no mixture"),
        (["tune", "TINY", "OUT", "--business", "SHOP", "--what", "all"], "router or experts"),
        (["tune", "TINY", "OUT", "--data", "rows.txt"], "rows.txt"),
        (["eval", "TINY", "SHOP"], "no test rows"),
    ],
)
def test_bad_input_gets_one_clear_sentence_and_exit_2(
    arguments: list[str], word: str, tiny: Path, fitted_shop: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"TINY": str(tiny), "SHOP": str(fitted_shop), "OUT": str(tmp_path / "out")}
    monkeypatch.setattr("sys.argv", ["coterie", "moe", *(places.get(a, a) for a in arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
