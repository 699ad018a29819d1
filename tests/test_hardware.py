"""What the machine does: the parts run, and their figures hang together. None of them is held to a speed."""

import json

import pytest

from configs import ConfigError
from lab import hardware
from lab.hardware import HardwareConfig, measure
from lab.pages import machine
from support.pages import Table
from support.results import Records

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cfg(tmp_path):
    """Settings for a model that takes no time."""
    tiny = tmp_path / "tiny.py"
    shape = dict(n_layers=1, d_model=32, n_heads=2, d_ff=32, vocab_size=64, context_length=48, batch_size=2)
    tiny.write_text("\n".join(f"{name} = {value}" for name, value in shape.items()))
    return HardwareConfig(rounds=2, device="cpu", out=str(tmp_path), configs=str(tiny), compile=False)


def test_what_is_measured_hangs_together_and_is_shown(cfg, tmp_path):
    cfg.only = "matmul,memory,training,attention,decoding,data"
    found = measure(cfg)
    assert json.loads((tmp_path / "hardware.json").read_text()) == found
    (row,) = found["training"]
    assert set(row["seconds"]) == {"eager", "eager, batches from a file", "forward", "forward and backward"}
    rate = row["tokens_per_second"]["eager"]
    assert rate == pytest.approx(2 * 48 / row["seconds"]["eager"])
    assert [r["task"] for r in found["decoding"]] == ["1 row", "16 rows", "16 answers to one prompt"]
    assert all(set(r["tokens_per_second"]) == {"transformers", "ours"} for r in found["decoding"])
    assert found["data"]["encoded_mb_per_second_and_core"] > 0 and found["memory"] == []
    blocks = machine(Records(tmp_path))
    tables = {b.name: [dict(zip(b.columns, row, strict=True)) for row in b.rows]
              for b in blocks if isinstance(b, Table)}  # fmt: skip
    assert tables["steps"][0]["tokens/s"] == f"{rate:,.0f}" and len(tables["decoding"]) == 6
    assert found["hardware"]["device"] in blocks[0].words
    assert len(tables["attention-speed"]) in (3, 6)


def test_parts_are_added_and_another_machines_are_not(cfg, tmp_path):
    cfg.only = "data"
    measure(cfg)
    file = tmp_path / "hardware.json"
    cfg.only = "memory"
    assert measure(cfg)["data"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hardware": {"device": "another"}}))
    assert "data" not in measure(cfg)
    cfg.only = "memory,speed"
    with pytest.raises(ConfigError, match="speed"):
        measure(cfg)


def test_peers_stand_side_by_side_and_other_machines_too(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "training_step", lambda c: {
        "tokens_per_second": {"transformers, eager": 100.0, "ours, eager": 150.0},
        "share_of_matmul": {"transformers, eager": 0.4, "ours, eager": 0.6},
    })  # fmt: skip
    rates = {"batch 1": {"transformers": 50.0, "ours": 100.0}}
    monkeypatch.setattr(hardware, "decoding_benchmark", lambda c: rates)
    cfg.only = "peers"
    found = measure(cfg)
    (tmp_path / "hardware-card.json").write_text(
        json.dumps(found | {"hardware": {"device": "B", "threads": 3}})
    )
    tables = [b for b in machine(Records(tmp_path)) if isinstance(b, Table)]
    assert [t.name for t in tables] == ["peers", "peers-2"]
    assert tables[0].rows[1] == ["a training step", "ours, eager", "150", "1.50"]
    assert tables[0].rows[3] == ["decoding, batch 1", "ours", "100", "2.00"]


def test_what_a_card_did_is_shown(tmp_path):
    row = {"config": "tiny", "rows": 2, "optimizer": "adamw", "seconds": {"compiled": 0.1}}
    row |= {"tokens_per_second": {"compiled": 960.0}, "share_of_matmul": {"compiled": 0.5}}
    row |= {
        "kernels": {"compiled": {"attention": 0.02, "nothing": 0.001}},
        "peak_memory": {"compiled": 2**31},
    }
    about = {"hardware": {"device": "a card", "threads": 2}, "cap_gib": 11.0}
    (tmp_path / "hardware.json").write_text(json.dumps(about | {"training": [row]}))
    table = next(b for b in machine(Records(tmp_path)) if isinstance(b, Table) and b.name == "kernels")
    assert table.rows == [["tiny", "compiled", "2.00", "20.0", "1.0"]]


def test_memory_is_shown_beside_the_plan(tmp_path):
    rows = [
        {"shape": "a", "rows": 8, "planned": 2 * 2**30, "plan": 3 * 2**30, "measured": 2.5 * 2**30},
        {"shape": "b", "rows": 8, "planned": 2**30, "plan": 2**30, "error": "out of memory within 11 GiB"},
    ]
    about = {"hardware": {"device": "a card", "threads": 2}, "cap_gib": 11.0}
    (tmp_path / "hardware.json").write_text(json.dumps(about | {"memory": rows}))
    (table,) = [b for b in machine(Records(tmp_path)) if isinstance(b, Table)]
    assert table.rows[0] == ["a", "8", "2.00", "2.50", "-20.0"]
    assert table.rows[1][3] == "out of memory within 11 GiB"
