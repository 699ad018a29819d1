"""What the machine does: the parts run, and their figures hang together. None of them is held to a speed."""

import json
import sys

import pytest

from configs import ConfigError
from lab import peers
from lab.hardware import HardwareConfig, main, measure
from lab.pages import machine
from support.costs import GIB
from support.pages import Table
from support.results import Records
from support.timing import in_turns, medians

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cfg(tmp_path):
    """Settings for a model that takes no time."""
    tiny = tmp_path / "tiny.py"
    shape = dict(n_layers=1, d_model=32, n_heads=2, d_ff=32, vocab_size=64, context_length=48, batch_size=2)
    tiny.write_text("\n".join(f"{name} = {value}" for name, value in shape.items()))
    return HardwareConfig(rounds=2, device="cpu", out=str(tmp_path), configs=str(tiny), compile=False)


def tables(folder) -> dict[str, list[list]]:
    """Rows of the report's tables of machines."""
    return {block.name: block.lines()[1:] for block in machine(Records(folder)) if isinstance(block, Table)}


def test_contenders_take_turns_after_warming_up(monkeypatch):
    calls = []
    times = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "abbaab" and [len(some) for some in times.values()] == [2, 2]
    assert len(in_turns({"a": lambda: calls.append("a")}, rounds=50, limit=0.0)["a"]) == 1
    took = iter([9, 9, 1, 5, 2])  # seconds, the first two of which warm up
    monkeypatch.setattr("support.timing.seconds_of", lambda run, calls: next(took))
    assert medians({"a": None}, rounds=3) == {"a": 2}


def test_what_is_measured_hangs_together_and_is_shown(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "tokenizers", lambda corpus, rounds: {"encode": 8.0, "tokenizers.encode": 2.0})
    cfg.only = "matmul,memory,training,decoding,sampling,lora,data"
    found = measure(cfg)
    assert json.loads((tmp_path / "hardware.json").read_text()) == found
    (row,) = found["training"]
    rate = row["tokens_per_second"]["eager"]
    assert rate == pytest.approx(2 * 48 / row["seconds"]["eager"])
    assert [r["task"] for r in found["decoding"]] == ["1 row", "16 rows", "16 answers to one prompt"]
    for measured in found["decoding"] + found["sampling"] + found["lora"]:
        assert {"transformers", "ours"} <= set(measured["tokens_per_second"])
    assert found["data"]["encoded_mb_per_second_and_core"] == 8 and found["memory"] == []
    shown = tables(tmp_path)
    assert f"{rate:,.0f}" in shown["steps"][0] and len(shown["decoding"]) >= 10

    cfg.only = "memory"
    assert measure(cfg)["training"], "parts of other calls stay"
    file = tmp_path / "hardware.json"
    file.write_text(json.dumps(found | {"hardware": {"device": "another"}}))
    assert "training" not in measure(cfg), "those of another machine do not"
    cfg.only = "memory,speed"
    with pytest.raises(ConfigError, match="speed"):
        measure(cfg)


def test_a_corpus_that_is_not_there_ends_with_its_message(tmp_path, monkeypatch):
    words = ["hardware.py", "--only=data", "--corpus=nowhere", "--device=cpu", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match='hardware.py: "nowhere" is neither'):
        main()


def test_peers_stand_side_by_side_and_what_a_gpu_did_beside_the_plan(cfg, tmp_path, monkeypatch):
    rates = {"transformers, eager": 100.0, "ours, eager": 150.0}
    step = {"tokens_per_second": rates, "share_of_matmul": dict.fromkeys(rates, 0.4)}
    monkeypatch.setattr(peers, "training_step", lambda *_: step)
    monkeypatch.setattr(peers, "decoding_rates", lambda *_: {"1 row": {"transformers": 50.0, "ours": 100.0}})
    cfg.only = "peers"
    measure(cfg)
    memory = [
        {"shape": "a", "rows": 8, "planned": 2 * GIB, "plan": 3 * GIB, "measured": 2.5 * GIB},
        {"shape": "b", "rows": 8, "planned": GIB, "plan": GIB, "error": "out of memory within 11 GiB"},
    ]
    gpu = {"hardware": {"device": "a GPU", "threads": 2}, "cap_gib": 11.0, "memory": memory}
    (tmp_path / "hardware-gpu.json").write_text(json.dumps(gpu))
    shown = tables(tmp_path)
    assert shown["peers"][1] == ["a training step in float32", "ours, eager", "150", "1.50"]
    assert shown["peers"][-1] == ["decoding, 1 row", "ours", "100", "2.00"]
    assert shown["memory-2"][0] == ["a", "8", "2.00", "2.50", ""]
    assert shown["memory-2"][1][4] == "out of memory within 11 GiB"
