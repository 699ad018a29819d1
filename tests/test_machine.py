"""A GPU that the driver shows and torch cannot use is named; nothing else is."""

import pytest
import torch

from support import machine, runs


@pytest.fixture
def computer(tmp_path, monkeypatch):
    """computer(driver, cuda): an NVIDIA driver, by a faked nvidia-smi, and a torch built for this CUDA."""

    def make(driver: str, cuda: str | None, smi: bool = True) -> None:
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(machine, "NVIDIA_SMI", ("nvidia-smi",))
        monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        script = f"echo {driver}" if smi and driver else "echo NVIDIA-SMI has failed; exit 9"
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        if driver and not smi:
            line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue\nGCC version: 12.2.0\n"
            (tmp_path / "version").write_text(line)

    return make


@pytest.mark.parametrize("smi", [True, False])
@pytest.mark.parametrize("driver, cuda, reason", [
    ("535.183.01", "13.0", "needs driver 580"),
    ("580.65.06", None, "without CUDA"),
    ("580.65.06", "13.0", "too old"),
])  # fmt: skip
def test_a_gpu_that_torch_cannot_use_stops_the_choice_of_a_profile(
    computer, capsys, monkeypatch, driver, cuda, reason, smi
):
    computer(driver, cuda, smi)
    assert machine.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and reason in err and driver in err
    assert machine.REINSTALL in err and "bash run_all.sh cpu" in err
    with pytest.raises(runs.TrainError, match=driver):
        machine.pick_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.unusable_gpu() == "", "hidden on purpose"


def test_the_profile_is_that_of_the_usable_gpu_or_cpu(computer, monkeypatch, capsys):
    computer("", "13.0")
    assert machine.main() == 0 and capsys.readouterr() == ("cpu\n", "")
    with pytest.raises(runs.TrainError, match="sees no CUDA card.$"):
        machine.pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # a Mac
    assert machine.main() == 0
    out, err = capsys.readouterr()
    assert out == "cpu\n" and "--device=mps" in err
    computer("580.65.06", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.main() == 0 and capsys.readouterr().out == "speedrun\n"
