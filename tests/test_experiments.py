"""The lab: statistics worked by hand, streams against slow references, and studies from end to end."""

import json
import math
import shutil
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import wait_until
from small_models import MOE, make

from configs import ConfigError
from data import documents
from lab import experiments as script
from lab import families, study
from lab.experiments import FAMILIES, FOLDER, ExperimentConfig, compared, plan, settings_of
from lab.families import experts_by_class, token_class
from lab.pages import lab
from lab.scaling import best_use, fit_law, fit_sizes, isoflop, loss_of
from lab.study import finished, prepare_tokens, spread, train_all, verdict
from model import ModelConfig
from support.costs import GIB, count_parameters, estimate_memory
from support.long_context import (
    attention_weights,
    endless,
    first_token_mass,
    full_attention,
    liveliness,
    rolling,
)
from support.pages import as_markdown
from support.results import Records
from tokenizer import Tokenizer, tokens_folder
from train import model_config

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(script.__file__).parents[1]


@pytest.fixture
def model():
    """One that looks around: at initialisation attention is nearly uniform."""
    return make(vocab_size=40, context_length=16, d_model=16, n_heads=2)


# -----------------------------------------------------------------------------
# configs


def test_every_experiment_has_a_hypothesis_a_baseline_and_a_family():
    names = {path.stem for path in (ROOT / FOLDER).glob("*.py")} - {"baseline"}
    assert names == {name for family in FAMILIES.values() for name in family}
    base = settings_of([str(FOLDER / "baseline.py")])
    for name in names:
        c = settings_of([str(FOLDER / f"{name}.py")])
        assert c.baseline == "configs/experiments/baseline.py" and c.hypothesis.endswith(".")
        tokens = c.max_steps * c.batch_size * c.context_length
        assert tokens == base.max_steps * base.batch_size * base.context_length, name
        text = (ROOT / FOLDER / f"{name}.py").read_text()
        if "Equal parameters" in text or "as many parameters" in text:
            mine, theirs = (count_parameters(model_config(x))["total"] for x in (c, base))
            assert abs(mine - theirs) <= 600, name  # norms of queries and keys, and rounding


def test_only_names_experiments_and_families_and_wandb_reaches_all_runs():
    def names(only: str) -> list[str]:
        runs = plan(ExperimentConfig(seeds=2, only=only, wandb="project"))
        assert all("--wandb=project" in run.words for run in runs)
        return [run.name for run in runs if run.seed == 1]

    assert names("gqa") == ["baseline", "kv_heads_1", "kv_heads_2"]
    assert names("qk_norm") == ["baseline", "qk_norm"]
    assert sum(name.startswith("scaling-") for name in names("scaling")) == 18
    with pytest.raises(ConfigError, match="qknorm"):
        names("qknorm")


# -----------------------------------------------------------------------------
# statistics


def test_a_difference_counts_if_its_interval_excludes_zero():
    d = spread([0.1, 0.2, 0.3])
    assert d["mean"] == pytest.approx(0.2) and d["sd"] == pytest.approx(0.1)
    assert d["high"] - d["mean"] == pytest.approx(4.30 * 0.1 / math.sqrt(3))
    assert verdict(d) == "no difference found"
    assert verdict(spread([0.1, 0.11, 0.12])) == "worse" and verdict(spread([-0.1, -0.11, -0.12])) == "better"
    assert verdict(spread([0.1])) == "one seed: no finding"


def test_isoflop_finds_the_law_that_made_the_points():
    points = []
    for budget in (1e12, 4e12, 16e12):
        for factor in (0.25, 0.5, 1, 2, 4):
            n = 0.1 * budget**0.5 * factor
            loss = 50 * budget**-0.1 + 0.05 * math.log(factor) ** 2
            points.append({"budget": budget, "parameters": n, "tokens": budget / (6 * n), "loss": loss})
    found = isoflop(points)
    for entry in found:
        size = 0.1 * entry["budget"] ** 0.5
        assert entry["inside"] and entry["parameters"] == pytest.approx(size, rel=1e-6)
        assert entry["loss"] == pytest.approx(50 * entry["budget"] ** -0.1)
    assert fit_sizes(found) == {"coefficient": pytest.approx(0.1), "exponent": pytest.approx(0.5)}
    assert fit_sizes(found[:2]) is None  # any two lie on a line
    far = [p | {"loss": p["loss"] + 5 * (p["parameters"] > 0.3 * p["budget"] ** 0.5)} for p in points]
    assert isoflop(far) == found  # a model that has not begun to learn bends nothing
    assert not any(b["inside"] for b in isoflop([p | {"loss": -math.log(p["parameters"])} for p in points]))


def test_a_law_is_found_through_the_runs_that_it_made_and_tells_how_to_spend_more():
    law, points = {"E": 0.5, "A": 40.0, "B": 300.0, "a": 0.35, "b": 0.4}, []
    for budget in (1e12, 2e12, 4e12):
        for n in np.geomspace(5e4, 2e6, 6):
            d = budget / (6 * n)
            points.append({"budget": budget, "parameters": n, "tokens": d, "loss": loss_of(law, n, d)})
    found = fit_law(points)
    assert found.pop("error") < 1e-6 and found == {k: pytest.approx(v, rel=1e-3) for k, v in law.items()}
    # The best size has a closed form (Hoffmann et al., 2022, equation 4).
    G = (0.35 * 40.0 / (0.4 * 300.0)) ** (1 / 0.75)
    best = best_use(found, None, 1e15)
    assert best["parameters"] == pytest.approx(G * (1e15 / 6) ** (0.4 / 0.75), rel=0.02)
    assert best["loss"] == pytest.approx(loss_of(law, best["parameters"], best["tokens"]), rel=1e-3)


def test_liveliness_sees_loops_repetition_and_the_topic():
    dull = liveliness("the cat sat " * 40, "An elephant walked home.")
    assert dull["loops"] == 1 and dull["repeated_4"] > 0.9 and dull["distinct_2"] < 0.1 and dull["topic"] == 0
    fresh = liveliness(" ".join(f"w{i}" for i in range(100)) + " elephant", "An elephant walked.")
    assert fresh == {"loops": 0, "repeated_4": 0, "distinct_2": 1, "topic": 0.5}


# -----------------------------------------------------------------------------
# streams


def test_a_rolling_cache_is_full_attention_and_then_only_the_kept_and_the_newest_tokens_count(model):
    """A slow reference: each loss from a forward pass over what the cache then holds.

    With one layer: in deeper ones, what was forgotten lives on in the states of those that saw it.
    """
    ids, T, keep = torch.randint(0, 40, (2, 40)), 16, 2
    begun = ids[:, :T]
    assert torch.allclose(rolling(model, begun, 1, T), full_attention(model, begun), atol=1e-5)
    model.model["layers"] = model.model["layers"][:1]
    model.config.n_layers = 1
    found = rolling(model, ids, keep, T)
    for t in range(T, 39):
        held = torch.cat([ids[:, :keep], ids[:, t + 1 - (T - keep) : t + 1]], dim=1)
        wanted = torch.nn.functional.cross_entropy(model(held)[:, -1], ids[:, t + 1], reduction="none")
        assert torch.allclose(found[:, t], wanted, atol=1e-4)


def test_stretching_by_one_changes_nothing(model):
    ids = torch.randint(0, 40, (2, 30))
    full = full_attention(model, ids)
    for stretch in ("linear", "ntk", "yarn"):
        assert torch.allclose(full_attention(model, ids, stretch, 1.0), full, atol=1e-5)
        assert not torch.allclose(full_attention(model, ids, stretch, 4.0), full, atol=1e-5)


def test_an_endless_stream_has_a_cache_of_constant_size(model):
    found = endless(model, 200, 16)
    assert set(found["cache_bytes"]) == {2 * 2 * 2 * 16 * 8 * 4}  # k, v; layers, heads, slots, width, bytes
    ids = torch.randint(0, 40, (2, 16))
    weights = attention_weights(model, ids, lambda w: w)  # (layers, B, H, T, T)
    assert first_token_mass(model, ids) == pytest.approx(weights[..., 8:, 0].mean((1, 2, 3)).tolist())


# -----------------------------------------------------------------------------
# experts


def test_an_expert_that_follows_the_class_of_a_token_shares_its_bits(tiny, monkeypatch):
    classes = {" 7": "digit", ".": "punctuation", " Anna": "capitalised", "nuts": "word", "\n": "other"}
    assert {piece: token_class(piece) for piece in classes} == classes
    tokenizer = Tokenizer.load(tiny["base"])
    model = make(**MOE | {"vocab_size": 400, "n_layers": 1, "n_experts": 2, "experts_per_token": 1})
    ids = torch.tensor([tokenizer.encode("7777....")])
    model.model["layers"][0].mlp.gate.weight.data.zero_()  # all go to one expert
    assert experts_by_class(model, ids, tokenizer)[0] == pytest.approx(0)
    choices = torch.eye(2)[(ids[0] == ids[0, 0]).long()]  # an expert for each class
    monkeypatch.setattr(families, "F", SimpleNamespace(linear=lambda x, gate: choices))
    assert experts_by_class(model, ids, tokenizer)[0] == pytest.approx(1)


# -----------------------------------------------------------------------------
# from end to end


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(islice(documents("storyworld", "train"), 600)))
    return str(file)


def test_runs_are_trained_once_compared_and_measured(text, tmp_path, capsys):
    cfg = ExperimentConfig(only="kv_heads_1,moe_4_top1", quick=True, corpus=text, out=str(tmp_path), jobs=2)
    found = script.experiment(cfg)
    entry, base = (found["experiments"][name] for name in ("kv_heads_1", "baseline"))
    gap = entry["seeds"][1]["bits_per_byte"] - base["seeds"][1]["bits_per_byte"]
    assert entry["difference"]["mean"] == pytest.approx(gap) and entry["verdict"] == "one seed: no finding"
    assert entry["command"].startswith("python train.py configs/experiments/kv_heads_1.py ")
    assert entry["seeds"][1]["steps"] == 40 and entry["seeds"][1]["tokens"] == 40 * 4 * 128
    cache = {k: v["cache_bytes_per_token"] for k, v in found["measured"]["gqa"].items()}
    assert cache["kv_heads_1"] * 4 == cache["baseline"] == 2 * 4 * 128 * 4  # k and v, layers, width, bytes
    routed = found["measured"]["moe"]["moe_4_top1"]
    assert min(routed["first"], routed["last"]) >= 1 and 0 <= routed["bits"] < math.log2(5)
    assert "| moe_4_top1 | " in as_markdown("t", {"lab": lab(Records(tmp_path))})
    saved = json.loads((cfg.home / "experiments.json").read_text())
    assert saved["experiments"]["kv_heads_1"]["bits_per_byte"] == entry["bits_per_byte"]
    assert "QUICK RUN" in capsys.readouterr().out
    before = {run.folder: (run.folder / "run.json").stat().st_mtime for run in plan(cfg)}
    assert train_all(plan(cfg), 2) == {}
    assert before == {run.folder: (run.folder / "run.json").stat().st_mtime for run in plan(cfg)}


def test_transfer_tunes_both_bases_on_the_same_examples_and_asks_one(text, tmp_path):
    cfg = ExperimentConfig(only="transfer", tasks="sentiment", quick=True, corpus=text, out=str(tmp_path))
    found = script.experiment(cfg)["measured"]["transfer"]["sentiment"]
    ways = {"scratch, tuned", "pretrained, tuned", "prompted, 0 shots", "prompted, 4 shots"}
    assert set(found) == {*ways, "pretrained - scratch"} and all(0 <= found[w]["mean"] <= 100 for w in ways)
    gain = found["pretrained, tuned"]["mean"] - found["scratch, tuned"]["mean"]
    assert found["pretrained - scratch"]["mean"] == pytest.approx(gain)
    runs = [r for r in plan(cfg) if r.script == "finetune.py"]
    assert len(runs) == 2 and all(finished(r) for r in runs)
    scratch, pretrained = (cfg.home / f"transfer-{base}-s1" for base in ("scratch", "pretrained"))
    shutil.copy(scratch / "model.safetensors", pretrained)
    assert [finished(r) for r in runs] == ["scratch" in r.name for r in runs], "another base: tune anew"
    assert families.transfer(cfg, []) == {}, "a seed that lacks a run is left out"


def test_what_shapes_cost(monkeypatch):
    monkeypatch.setattr(families, "SHAPES", {"tiny": (2, 32, 3)})
    found = families.costs(ExperimentConfig(device="cpu"), [])["tiny"]
    wanted = ModelConfig(vocab_size=1024, context_length=128, n_layers=2, d_model=32, n_heads=4)
    assert found["parameters"] == count_parameters(wanted)["total"] and found["rows"] == 3
    most = found["most_rows_in_12_gib"]
    assert estimate_memory(wanted, most)["peak"] <= 12 * GIB < estimate_memory(wanted, 2 * most)["peak"]


def test_half_made_tokens_are_completed_and_a_run_that_fails_is_an_entry_that_says_why(text, tmp_path):
    cfg = ExperimentConfig(only="qk_norm", quick=True, corpus=text, out=str(tmp_path), jobs=1)
    runs = plan(cfg)
    folder = tokens_folder(settings_of(runs[0].words))
    for name in ("", "train.json", "validation.bin", "tokenizer.json"):
        (folder / name).unlink() if name else None
        assert not study.has_tokens(folder)
        prepare_tokens(runs)
        assert study.has_tokens(folder), name
    runs[1].words.append("--tokens=nowhere")
    failed = train_all(runs[1:], 1)
    assert runs[1].log.read_text().startswith("$ ")
    entry = compared("qk_norm", runs, failed)
    assert "nowhere" in entry["failed"][1] and "bits_per_byte" not in entry
    assert "failed: " in script.line("qk_norm", entry)


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(text, tmp_path):
    cfg = ExperimentConfig(only="qk_norm", corpus=text, out=str(tmp_path), seeds=1)
    words = ["--only=qk_norm", f"--corpus={text}", f"--out={tmp_path}", "--seeds=1", "--jobs=2"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even if we run in the background
    command = [sys.executable, "-m", "lab.experiments", *words]
    lab = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, preexec_fn=heed)
    try:
        metrics = cfg.home / "baseline-s1/metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size)
        lab.send_signal(signal.SIGINT)
        assert lab.wait(60) == 130
    finally:
        lab.kill()
    assert json.loads((cfg.home / "baseline-s1/run.json").read_text())["status"] != "running"
    assert not finished(plan(cfg)[0])


REFUSES = """import sys
print(sys.argv[-1])
sys.exit({status} if sys.argv[-1] != "--overwrite" else 0)
"""


@pytest.mark.parametrize("status", [0, 1], ids=["goes on", "cannot go on"])
@pytest.mark.parametrize("record", ["none", "interrupted", "finished otherwise", "damaged"])
def test_a_begun_run_goes_on_and_starts_anew_if_it_cannot(status, record, tmp_path, monkeypatch):
    """With a stand-in for train.py that can resume, or refuses to."""
    run = plan(ExperimentConfig(only="qk_norm", out=str(tmp_path), seeds=1))[0]
    settings = vars(settings_of(run.words))
    del settings["attention_kind"]  # as in a run that was made before there was this setting
    complete = json.dumps({"status": "finished", "settings": settings})
    run.folder.mkdir(parents=True)
    file = run.folder / "run.json"
    file.write_text(complete)
    assert finished(run)
    file.unlink()
    if record == "interrupted":
        file.write_text(json.dumps({"status": "interrupted", "settings": settings}))
    if record == "finished otherwise":
        file.write_text(json.dumps({"status": "finished", "settings": settings | {"batch_size": 5}}))
    if record == "damaged":
        file.write_text(complete[:30])
    assert not finished(run)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text(REFUSES.format(status=status))
    failed, log = train_all([run], 1), run.log.read_text()
    attempts = 1 if status == 0 or record in ("none", "finished otherwise") else 2
    assert log.count("$ ") == attempts
    assert log.endswith("--overwrite\n") == (record == "finished otherwise" or attempts == 2)
    assert bool(failed) == (status == 1 and record == "none"), "a new run is tried once"


def test_failed_runs_are_named_and_give_a_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab.experiments"])
    monkeypatch.setattr(script, "experiment", lambda cfg: {"failed": {"out/a-s1": "why"}})
    with pytest.raises(SystemExit, match="out/a-s1: why"):
        script.main()
