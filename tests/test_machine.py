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
    ("550.54", "13.0", "needs driver 580"),
    ("580.65.06", None, "without CUDA"),
    ("535.183.01", None, "without CUDA"),
    ("580.65.06", "13.0", "too old"),
])  # fmt: skip
def test_a_gpu_that_torch_cannot_use_stops_the_choice_of_a_profile(
    computer, capsys, driver, cuda, reason, smi
):
    computer(driver, cuda, smi)
    assert machine.main() == 1
    out, told = capsys.readouterr()
    assert out == "" and reason in told and driver in told
    assert machine.REINSTALL in told and "bash run_all.sh cpu" in told
    with pytest.raises(runs.TrainError, match=driver):
        machine.pick_device("cuda")


def test_without_a_driver_the_profile_is_cpu(computer, capsys):
    computer("", "13.0")
    assert machine.main() == 0 and capsys.readouterr() == ("cpu\n", "")
    with pytest.raises(runs.TrainError, match="sees no CUDA card.$"):
        machine.pick_device("cuda")


def test_a_gpu_that_was_hidden_on_purpose_is_no_problem(computer, monkeypatch):
    computer("535.183.01", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.unusable_gpu() == ""


def test_a_gpu_that_torch_can_use_gives_speedrun(computer, monkeypatch, capsys):
    computer("580.65.06", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.main() == 0 and capsys.readouterr().out == "speedrun\n"


def test_on_a_mac_the_flag_that_uses_its_gpu_is_named(computer, monkeypatch, capsys):
    computer("", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.main() == 0
    out, told = capsys.readouterr()
    assert out == "cpu\n" and "--device=mps" in told
