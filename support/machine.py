"""This machine: its GPU, the device and dtype that suit it, and what run.json records of it.

python -m support.machine      # the profile of run_all.sh for this machine, or why there is none
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from model import n_parameters
from support import kernels
from support.runs import TrainError

# When the first sine, logarithm or the like is computed, MKL finds out which code suits this CPU. Two threads
# that do so at once may go on with different code, whose results differ in the last bit. One in eleven runs
# of configs/cpu.py on two threads began with other cosines for RoPE. So one thread computes a first one here.
torch.zeros(1).cos()

DRIVER_FILE = Path("/proc/driver/nvidia/version")
NVIDIA_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # the second: WSL, often not on the PATH
DRIVER_OF_CUDA_13 = 580  # the oldest driver that works with CUDA 13
REINSTALL = ".venv/bin/pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"


def nvidia_driver() -> str:
    """The version of the NVIDIA driver, such as 535.183.01; "" without a driver."""
    text = ""
    for name in filter(shutil.which, NVIDIA_SMI):
        command = [name, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            text += subprocess.check_output(command, text=True, timeout=30)
    if DRIVER_FILE.exists():
        text += DRIVER_FILE.read_text(errors="replace").partition("Kernel Module")[2]
    version = re.search(r"\d+(\.\d+)+", text)
    return version[0] if version else ""


def unusable_gpu() -> str:
    """Why torch cannot use the NVIDIA GPU of this machine, and what to do; "" if there is none, or it can."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or not (driver := nvidia_driver()):
        return ""
    cuda = torch.version.cuda
    if cuda is None:
        cause = "it was installed without CUDA (torch.version.cuda is None)"
    elif int(cuda.split(".")[0]) >= 13 and int(driver.split(".")[0]) < DRIVER_OF_CUDA_13:
        cause = f"it was built for CUDA {cuda}, which needs driver {DRIVER_OF_CUDA_13} or newer"
    else:
        cause = f"it was built for CUDA {cuda}. The GPU may be too old for it, or not in this container"
    return (
        f"This machine has an NVIDIA GPU (driver {driver}), but torch {torch.__version__} cannot use it: "
        f"{cause}. Install the build for CUDA 12.6, which runs with driver 525 or newer:\n  {REINSTALL}"
    )


def main() -> int:
    """Prints the default profile of run_all.sh. Returns 1, with a message, if the GPU cannot be used."""
    if problem := unusable_gpu():
        print(f"run_all.sh: {problem}\nOr train on the CPU: bash run_all.sh cpu", file=sys.stderr)
        return 1
    if torch.backends.mps.is_available():
        note = "this Mac's GPU is not used by default; a single script uses it with --device=mps"
        print(f"run_all.sh: {note}", file=sys.stderr)
    print("speedrun" if torch.cuda.is_available() else "cpu")
    return 0


# Dense bfloat16 (fp16) TFLOP/s with float32 accumulation, from the makers' data sheets.
PEAK_TFLOPS = {
    "RTX 3060": 25.5, "RTX 3090": 71.2, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3, "RTX 4090": 165.2,
    "RTX 5090": 209.5, "A100": 312.0, "H100": 989.0, "H200": 989.0,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that a GPU could do, None where it is not known: better no MFU than a wrong one."""
    known = re.findall(rf"\b({'|'.join(PEAK_TFLOPS)})\b", device_name)
    other = r"Ti|SUPER|Laptop|Max-Q|PCIe|NVL|D$"  # slower or faster kin
    if not known or re.search(other, device_name.replace("4060 Ti", "")):
        return None
    return PEAK_TFLOPS[known[0]] * 1e12


def pick_device(device: str) -> torch.device:
    """auto: CUDA if there is a GPU that torch can use, else the CPU. Installs the faster kernels."""
    kernels.install()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        cause = f"torch {torch.__version__} sees no CUDA card. {unusable_gpu()}"
        raise TrainError(f"--device={device}, but {cause}".strip())
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()  # a known name may lack the hardware; "meta" holds no numbers
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # on it CUDA graphs are recorded
    except (RuntimeError, AssertionError, ImportError):
        raise TrainError(
            f"--device={device} is none that torch can use here: cuda, cuda:1, cpu, mps"
        ) from None
    if chosen.type == "cpu":
        keep_freed_memory()
        # Numbers near 1e-40 can slow a CPU down tenfold. Drawing 64 tokens from 49,152 whose logits lie far
        # apart took 31 ms with them and 8 without.
        torch.set_flush_denormal(True)
    return chosen


@functools.cache
def keep_freed_memory() -> None:
    """Tells glibc not to return the memory of tensors to the system, which would clear every page before the
    next step gets it. A step on a CPU is 1.03 to 1.08 times as fast; that of a model of 135M parameters 1.6
    times. Tensors of 128 MiB or more are still returned: those of ever new shapes would leave gaps, and a
    channel of 135M parameters grew by 1.3 GB a step. Now it stays at 6 GB, and is as fast.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        mmap_threshold = -3
        trim_threshold = -1
        libc.mallopt(mmap_threshold, 2**27)
        libc.mallopt(trim_threshold, 2**31 - 1)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it faster than float32, else the safe one."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and kernels.multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


SMALL = 20_000_000  # parameters


def dtype_for(dtype: str, model: torch.nn.Module, device: torch.device) -> torch.dtype:
    """`pick_dtype` for batches of ever new shapes, for each of which bfloat16 needs new kernels on a CPU.

    auto: there float32 for a small model. With 0.9M parameters it was 1.1 (SFT) to 1.6 times (the verifier)
    as fast, in a third of the memory.
    """
    small = n_parameters(model) < SMALL
    if dtype == "auto" and device.type == "cpu" and small:
        return torch.float32
    return pick_dtype(dtype, device)


def autocast(device: torch.device, dtype: torch.dtype, cache: bool | None = None) -> torch.autocast:
    """A context for forward passes in `dtype`. `cache`: keep the casts of weights to the end of the pass."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)


def hardware(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "platform": platform.platform(terse=True)}


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict:
    names = ("torch", "numpy", "tiktoken", "transformers", "datasets", "peft")
    have = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return {"python": platform.python_version()} | have


def git_commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(git, text=True, timeout=10, stderr=subprocess.DEVNULL).strip()
    return "unknown"


def peak_resident_bytes() -> int:
    """The most memory this process ever held."""
    # Linux's getrusage goes on from what the parent held when it made this process; VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process ever held, on the GPU if it computes there."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()


if __name__ == "__main__":
    sys.exit(main())
