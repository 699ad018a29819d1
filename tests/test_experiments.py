"""The lab: statistics worked by hand, streams against slow references, and one run from end to end."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments as script
from configs import ConfigError
from experiments import (
    FAMILIES,
    FOLDER,
    ExperimentConfig,
    compared,
    experts_by_class,
    fit_law,
    fit_sizes,
    isoflop,
    loss_of,
    plan,
    predict,
    settings_of,
    spread,
    token_class,
    verdict,
)
from model import ModelConfig, ModernDecoderLM
from support.costs import count_parameters, estimate_memory
from support.long_context import (
    by_position,
    endless,
    first_token_mass,
    full_attention,
    liveliness,
    rolling,
    stretched_rope,
)
from tokenizer import SPECIAL_TOKENS, Tokenizer, tokens_folder, train_bpe
from train import model_config

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(script.__file__).parent


@pytest.fixture
def model():
    """One that looks around: at initialisation attention is nearly uniform."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, context_length=16, n_layers=2, d_model=16, n_heads=2, d_ff=32)
    model = ModernDecoderLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    return model


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
        if (
            "Equal parameters" in c.hypothesis
            or "as many parameters" in (ROOT / FOLDER / f"{name}.py").read_text()
        ):
            mine, theirs = (count_parameters(model_config(x))["total"] for x in (c, base))
            assert abs(mine - theirs) <= 600, name  # norms of queries and keys, and rounding


def test_only_names_experiments_and_families():
    def names(**more) -> list[str]:
        return [r.name for r in plan(ExperimentConfig(seeds=2, **more)) if r.seed == 1]

    assert names(only="gqa") == ["baseline", "kv_heads_1", "kv_heads_2"]
    assert names(only="qk_norm") == ["baseline", "qk_norm"]
    assert len([n for n in names(only="scaling") if n.startswith("scaling-")]) == 18
    with pytest.raises(ConfigError, match="qknorm"):
        plan(ExperimentConfig(only="qknorm"))


# -----------------------------------------------------------------------------
# statistics


def test_wandb_reaches_all_runs():
    for run in plan(ExperimentConfig(seeds=1, wandb="project")):
        assert "--wandb=project" in run.words()
    assert not any("wandb" in word for run in plan(ExperimentConfig(seeds=1)) for word in run.words())


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
        best = 0.1 * budget**0.5
        for factor in (0.25, 0.5, 1, 2, 4):
            n = best * factor
            loss = 50 * budget**-0.1 + 0.05 * math.log(factor) ** 2
            points.append({"budget": budget, "parameters": n, "tokens": budget / (6 * n), "loss": loss})
    for entry in isoflop(points):
        assert entry["inside"] and entry["parameters"] == pytest.approx(
            0.1 * entry["budget"] ** 0.5, rel=1e-6
        )
        assert entry["loss"] == pytest.approx(50 * entry["budget"] ** -0.1)
    assert fit_sizes(isoflop(points)) == {"coefficient": pytest.approx(0.1), "exponent": pytest.approx(0.5)}
    assert fit_sizes(isoflop(points)[:2]) is None  # any two lie on a line
    far = [p | {"loss": p["loss"] + 5 * (p["parameters"] > 0.3 * p["budget"] ** 0.5)} for p in points]
    assert isoflop(far) == isoflop(points)  # a model that has not begun to learn bends nothing
    for p in points:
        p["loss"] = -math.log(p["parameters"])  # ever better: no minimum among these sizes
    assert not any(b["inside"] for b in isoflop(points))


def test_a_law_is_found_through_the_runs_that_it_made_and_tells_how_to_spend_more():
    law, points = {"E": 0.5, "A": 40.0, "B": 300.0, "a": 0.35, "b": 0.4}, []
    for budget in (1e12, 2e12, 4e12):
        for n in np.geomspace(5e4, 2e6, 6):
            d = budget / (6 * n)
            points.append({"budget": budget, "parameters": n, "tokens": d, "loss": loss_of(law, n, d)})
    found = fit_law(points)
    assert found == {k: pytest.approx(v, rel=1e-3) for k, v in law.items()} | {
        "error": pytest.approx(0, abs=1e-6)
    }
    # The best size has a closed form (Hoffmann et al., 2022, equation 4).
    G = (0.35 * 40.0 / (0.4 * 300.0)) ** (1 / 0.75)
    best = predict(found, 1e15)
    assert best["parameters"] == pytest.approx(G * (1e15 / 6) ** (0.4 / 0.75), rel=0.02)
    assert best["loss"] == pytest.approx(loss_of(law, best["parameters"], best["tokens"]), rel=1e-3)


def test_positions_are_grouped_by_contexts():
    losses = torch.cat([torch.full((2, 16), 1.0), torch.full((2, 16), 2.0), torch.full((2, 31), 3.0)], dim=1)
    found = by_position(losses, 16)
    assert found == {k: pytest.approx(math.exp(v)) for k, v in {"0-1": 1, "1-2": 2, "2-4": 3}.items()}


def test_liveliness_sees_loops_repetition_and_the_topic():
    dull = liveliness("the cat sat " * 40, "An elephant walked home.")
    assert dull["loops"] == 1 and dull["repeated_4"] > 0.9 and dull["distinct_2"] < 0.1 and dull["topic"] == 0
    words = " ".join(f"w{i}" for i in range(100))
    fresh = liveliness(words + " elephant", "An elephant walked.")
    assert fresh["loops"] == 0 and fresh["repeated_4"] == 0 and fresh["distinct_2"] == 1
    assert fresh["topic"] == 0.5


# -----------------------------------------------------------------------------
# streams


def test_a_rolling_cache_is_full_attention_until_it_is_full(model):
    ids = torch.randint(0, 40, (3, 16))
    assert torch.allclose(rolling(model, ids, keep=1), full_attention(model, ids), atol=1e-5)


def test_beyond_the_context_only_the_kept_and_the_newest_tokens_count(model):
    """A slow reference: each loss from a forward pass over what the cache then holds.

    With one layer: in deeper ones, what was forgotten lives on in the states of those that saw it.
    """
    model.model["layers"] = model.model["layers"][:1]
    model.config.n_layers = 1
    ids, T, keep = torch.randint(0, 40, (2, 40)), 16, 2
    found = rolling(model, ids, keep)
    for t in range(T, 39):
        held = torch.cat([ids[:, :keep], ids[:, t + 1 - (T - keep) : t + 1]], dim=1)
        wanted = torch.nn.functional.cross_entropy(model(held)[:, -1], ids[:, t + 1], reduction="none")
        assert torch.allclose(found[:, t], wanted, atol=1e-4)


def test_stretching_by_one_changes_nothing(model):
    ids = torch.randint(0, 40, (2, 30))
    plain = full_attention(model, ids)
    for stretch in ("linear", "ntk", "yarn"):
        assert torch.allclose(full_attention(model, ids, stretch, 1.0), plain, atol=1e-5)
        assert not torch.allclose(full_attention(model, ids, stretch, 4.0), plain, atol=1e-5)


@pytest.mark.parametrize("stretch", ["linear", "yarn"])
def test_stretched_rope_is_hugging_faces(stretch):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    c = ModelConfig(vocab_size=40, context_length=64, n_layers=1, d_model=128, n_heads=2)
    rope = {"rope_type": stretch, "factor": 4.0, "rope_theta": c.rope_theta}
    rope |= {"original_max_position_embeddings": 64} if stretch == "yarn" else {}
    theirs = LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=256,
                         rope_parameters=rope)  # fmt: skip
    frequencies, scale = ROPE_INIT_FUNCTIONS[stretch](theirs, "cpu")
    angles = torch.arange(256).float()[:, None] * frequencies
    cos, sin = stretched_rope(c, 256, stretch, 4.0)
    torch.testing.assert_close(cos[:, 32:], angles.cos() * scale)
    torch.testing.assert_close(sin[:, 32:], angles.sin() * scale)


def test_an_endless_stream_has_a_cache_of_constant_size(model):
    found = endless(model, 200)
    assert set(found["cache_bytes"]) == {
        2 * 2 * 2 * 16 * 8 * 4
    }  # k and v, layers, heads, slots, head_dim, bytes
    assert len(found["tokens_per_second"]) == 10


def test_attention_to_the_first_token_is_a_share(model):
    ids = torch.randint(0, 40, (2, 16))
    shares = first_token_mass(model, ids)
    assert len(shares) == 2 and all(0 < s < 1 for s in shares)
    assert first_token_mass(model, ids, first=16) == pytest.approx([1, 1])
    sink = ModernDecoderLM(ModelConfig(**{**model.config.__dict__, "n_sinks": 1})).eval()
    assert all(s < 1 for s in first_token_mass(sink, ids, first=16))


# -----------------------------------------------------------------------------
# experts


def test_experts_are_counted_by_class_of_token():
    texts = ["Anna has 12 nuts. She buys 3 more."] * 50
    tokenizer = Tokenizer(*train_bpe(texts, 280, SPECIAL_TOKENS, split_digits=True), SPECIAL_TOKENS)
    assert [token_class(x) for x in (" 7", ".", " Anna", "nuts", "\n", " ")] == [
        "digit", "punctuation", "capitalised", "word", "other", "other",
    ]  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=16, n_layers=1, d_model=8, n_heads=2,
                         ffn="moe", n_experts=2, experts_per_token=1, d_ff=8)  # fmt: skip
    model, ids = ModernDecoderLM(config).eval(), torch.tensor([tokenizer.encode("7 7 7 . . .")])
    seen = []
    model.model["layers"][0].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].clone()))
    with torch.no_grad():
        (layer,) = experts_by_class(model, ids, tokenizer)
    with torch.no_grad():
        choice = (seen[0] @ model.model["layers"][0].mlp.gate.weight.T).argmax(-1)[0]
    kinds = np.array([token_class(tokenizer.decode([i])) for i in ids[0].tolist()])
    for kind in ("digit", "punctuation"):
        wanted = [float((choice[kinds == kind] == e).float().mean()) for e in (0, 1)]
        assert layer["share"][kind] == pytest.approx(wanted, abs=1e-3)
    assert layer["bits"] >= 0 and sum(layer["share"]["word"]) == 0


# -----------------------------------------------------------------------------
# from end to end


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    from itertools import islice

    from data import documents

    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(islice(documents("storyworld", "train"), 600)))
    return str(file)


def test_runs_are_trained_once_compared_and_measured(text, tmp_path, capsys):
    cfg = ExperimentConfig(only="kv_heads_1,moe_4_top1", quick=True, corpus=text, out=str(tmp_path), jobs=2)
    found = script.experiment(cfg)
    entry = found["experiments"]["kv_heads_1"]
    base = found["experiments"]["baseline"]
    gap = entry["seeds"][1]["bits_per_byte"] - base["seeds"][1]["bits_per_byte"]
    assert entry["difference"]["mean"] == pytest.approx(gap) and entry["verdict"] == "one seed: no finding"
    assert entry["command"].startswith("python train.py configs/experiments/kv_heads_1.py ")
    assert entry["seeds"][1]["steps"] == 40 and entry["seeds"][1]["tokens"] == 40 * 4 * 128
    cache = {k: v["cache_bytes_per_token"] for k, v in found["measured"]["gqa"].items()}
    assert cache["kv_heads_1"] * 4 == cache["baseline"] == 2 * 4 * 128 * 4  # k and v, layers, width, bytes
    routed = found["measured"]["moe"]["moe_4_top1"]
    assert len(routed["classes"]) == 4 and min(routed["routing"][1]["busiest_expert"]) >= 1
    (file,) = tmp_path.glob("experiments/*/experiments.json")
    assert (
        json.loads(file.read_text())["experiments"]["kv_heads_1"]["bits_per_byte"] == entry["bits_per_byte"]
    )
    assert "QUICK RUN" in capsys.readouterr().out
    runs = plan(cfg)
    before = {r.folder: (r.folder / "run.json").stat().st_mtime for r in runs}
    assert script.train_all(runs, 2) == {} and "runs are finished" not in capsys.readouterr().out
    assert before == {r.folder: (r.folder / "run.json").stat().st_mtime for r in runs}


def test_transfer_tunes_both_bases_on_the_same_examples_and_asks_one(text, tmp_path):
    cfg = ExperimentConfig(
        only="transfer", tasks="sentiment", quick=True, corpus=text, out=str(tmp_path), jobs=2
    )
    found = script.experiment(cfg)["measured"]["transfer"]["sentiment"]
    ways = {"scratch, tuned", "pretrained, tuned", "prompted, 0 shots", "prompted, 4 shots"}
    assert set(found) == {*ways, "pretrained - scratch"} and all(0 <= found[w]["mean"] <= 100 for w in ways)
    gain = found["pretrained, tuned"]["mean"] - found["scratch, tuned"]["mean"]
    assert found["pretrained - scratch"]["mean"] == pytest.approx(gain)
    runs = [r for r in plan(cfg) if r.script == "finetune.py"]
    assert len(runs) == 2 and all(script.finished(r) for r in runs)
    for folder in ("transfer-scratch-s1", "transfer-pretrained-s1"):
        (file,) = tmp_path.glob(f"experiments/*/{folder}/model.safetensors")
        assert (file.parent / "run.json").exists()
    file.write_bytes(next(tmp_path.glob("experiments/*/transfer-scratch-s1/model.safetensors")).read_bytes())
    assert [script.finished(r) for r in runs] == ["scratch" in r.name for r in runs], (
        "another base: tune anew"
    )
    assert script.transfer(cfg, plan(cfg), torch.device("cpu")) == {}, "a seed that lacks a run is left out"


def test_what_shapes_cost(monkeypatch):
    monkeypatch.setattr(script, "SHAPES", {"tiny": (2, 32, 3)})
    found = script.costs(torch.device("cpu"))["tiny"]
    wanted = ModelConfig(vocab_size=1024, context_length=128, n_layers=2, d_model=32, n_heads=4)
    assert found["parameters"] == count_parameters(wanted)["total"] and found["rows"] == 3
    assert found["tokens_per_second"] > 0 and found["peak_memory_gib"] > 0
    most = found["most_rows_in_12_gib"]
    assert estimate_memory(wanted, most)["peak"] <= 12 * 2**30 < estimate_memory(wanted, 2 * most)["peak"]


def test_a_run_that_fails_is_an_entry_that_says_why(text, tmp_path):
    cfg = ExperimentConfig(only="qk_norm", quick=True, corpus=text, out=str(tmp_path), jobs=1)
    runs = plan(cfg)
    script.prepare_tokens(runs)
    runs[1].flags.append("--tokens=nowhere")
    failed = script.train_all(runs[1:], 1)
    assert script.log_of(runs[1]).read_text().startswith("$ ")
    entry = compared("qk_norm", runs, failed)
    assert "nowhere" in entry["failed"][1] and "bits_per_byte" not in entry
    assert "failed: " in "\n".join(script.table({"qk_norm": entry}))


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(text, tmp_path):
    words = ["--only=qk_norm", f"--corpus={text}", f"--out={tmp_path}", "--seeds=1", "--jobs=2"]
    lab = subprocess.Popen(
        [sys.executable, "experiments.py", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # even if we run in the background
    )
    try:
        deadline = time.monotonic() + 120
        while not any(f.stat().st_size for f in tmp_path.glob("experiments/*/baseline-s1/metrics.jsonl")):
            assert time.monotonic() < deadline and lab.poll() is None
            time.sleep(0.2)
        lab.send_signal(signal.SIGINT)
        assert lab.wait(60) == 130
    finally:
        lab.kill()
    (file,) = tmp_path.glob("experiments/*/baseline-s1/run.json")
    assert json.loads(file.read_text())["status"] != "running"
    cfg = ExperimentConfig(only="qk_norm", corpus=text, out=str(tmp_path), seeds=1)
    assert not script.finished(plan(cfg)[0])


def begun(run: script.Run, **settings) -> None:
    """The folder of a run that was interrupted."""
    found = {"status": "interrupted", "settings": vars(settings_of(run.words())) | settings}
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "run.json").write_text(json.dumps(found))


def test_a_begun_run_goes_on_and_one_with_other_settings_starts_anew(tmp_path):
    (run, *_) = plan(ExperimentConfig(only="qk_norm", out=str(tmp_path), seeds=1))
    assert script.way_to_start(run) == "new"
    begun(run)
    assert script.way_to_start(run) == "resume" and not script.finished(run)
    for changed in ({"max_steps": 3}, {"batch_size": 5}, {"learning_rate": 1.0}):
        begun(run, **changed)
        assert script.way_to_start(run) == "overwrite", changed
    begun(run)
    saved = json.loads((run.folder / "run.json").read_text())
    del saved["settings"]["attention_kind"]  # as in a run that was made before there was this setting
    (run.folder / "run.json").write_text(json.dumps(saved))
    assert script.way_to_start(run) == "resume"
    (run.folder / "run.json").write_text('{"status": "interr')
    assert script.way_to_start(run) == "overwrite", "a damaged run.json does not stop the lab"


def test_a_run_that_cannot_go_on_starts_anew_and_keeps_its_log(tmp_path, monkeypatch, capsys):
    """A stand-in for train.py that refuses to resume."""
    monkeypatch.setattr(script, "ROOT", tmp_path)
    code = "import sys\nprint(sys.argv[-1])\nsys.exit('no' if sys.argv[-1] != '--overwrite' else 0)\n"
    (tmp_path / "train.py").write_text(code)
    (run, other) = plan(ExperimentConfig(only="qk_norm", out=str(tmp_path), seeds=1))
    begun(run)
    assert script.train_all([run], 1) == {}
    assert "it starts anew" in capsys.readouterr().out
    log = script.log_of(run).read_text()
    assert log.count("$ ") == 2 and "no\n" in log and log.endswith("--overwrite\n")
    assert script.train_all([other], 1) == {str(other.folder): "no"}, "a new run is tried once"


def test_half_made_tokens_are_completed(text, tmp_path):
    runs = plan(ExperimentConfig(only="qk_norm", quick=True, corpus=text, out=str(tmp_path)))
    folder = tokens_folder(settings_of(runs[0].words()))
    script.prepare_tokens(runs)
    assert script.has_tokens(folder)
    for name in ("train.json", "validation.bin", "tokenizer.json"):
        (folder / name).unlink()
        assert not script.has_tokens(folder)
        script.prepare_tokens(runs)
        assert script.has_tokens(folder), name


def test_failed_runs_are_named_and_give_a_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments.py"])
    monkeypatch.setattr(script, "experiment", lambda cfg: {"failed": {"out/a-s1": "why"}})
    with pytest.raises(SystemExit, match="out/a-s1: why"):
        script.main()
    monkeypatch.setattr(script, "experiment", lambda cfg: {"failed": {}})
    script.main()
