"""This machine: a GPU that torch cannot use is named; the dtype, the peak rate and the memory that it has."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import ROOT
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


@pytest.mark.parametrize("driver, cuda, smi, reason", [
    ("535.183.01", "13.0", True, "needs driver 580"), ("580.65.06", None, False, "without CUDA"),
    ("580.65.06", "13.0", True, "too old"),
])  # fmt: skip
def test_a_gpu_that_torch_cannot_use_stops_the_choice_of_a_profile(
    computer, capsys, monkeypatch, driver, cuda, smi, reason
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


@pytest.mark.parametrize("amx, avx, amd, able", [
    (False, False, True, False), (True, True, False, True), (False, True, True, True),
    (False, True, False, False),  # Intel's AVX512-BF16 without AMX is slower than float32
])  # fmt: skip
def test_auto_takes_bfloat16_where_a_cpu_multiplies_it_faster(monkeypatch, amx, avx, amd, able):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(machine.kernels, "is_amd", lambda: amd)
    cpu, fast = torch.device("cpu"), torch.bfloat16 if able else torch.float32
    with torch.device("meta"):
        small, large = torch.nn.Linear(100, 100), torch.nn.Linear(5000, 5000)
    assert machine.pick_dtype("auto", cpu) == machine.dtype_for("auto", large, cpu) == fast
    assert machine.dtype_for("auto", small, cpu) == torch.float32
    assert machine.dtype_for("bfloat16", small, cpu) == torch.bfloat16


@pytest.mark.parametrize("name, teraflops", [
    ("RTX 3060", 25.5), ("RTX 4060 Ti", 44.1), ("A100-SXM4-80GB", 312.0), ("T4", None), ("RTX 3060 Ti", None),
    ("GH200 480GB", None), ("RTX 4060 Ti Laptop GPU", None),
])  # fmt: skip
def test_only_gpus_whose_peak_is_known_get_one(name, teraflops):
    assert machine.peak_flops(f"NVIDIA {name}") == (teraflops and teraflops * 1e12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it so")
def test_peak_memory_is_that_of_this_process_and_not_of_its_parent():
    ballast = np.ones(100_000_000)  # 800 MB
    program = "from support.machine import peak_resident_bytes; print(peak_resident_bytes())"
    child = int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True))
    assert 50e6 < child < 700e6 < ballast.nbytes <= machine.peak_resident_bytes()


FIRST_COSINES = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Record(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "cos" in str(function):
            print(args[0].numel())
        return function(*args, **kwargs or {})

with Record():
    import train
    train.ModernDecoderLM(train.ModelConfig())
"""


def test_one_thread_computes_the_first_cosine_of_a_process():
    """Two may get different code of MKL for it: one process in ten did, in a loop of `x.cos() == x.cos()`."""
    sizes = subprocess.check_output([sys.executable, "-c", FIRST_COSINES], cwd=ROOT, text=True).split()
    assert sizes[0] == "1" and len(sizes) > 1  # the second: RoPE's table
