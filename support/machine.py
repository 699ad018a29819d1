"""The GPU of this machine, and whether torch can use it.

python -m support.machine      # the profile of run_all.sh for this machine, or why there is none
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")
NVIDIA_SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # the second: WSL, often not on the PATH
DRIVER_OF_CUDA_13 = 580  # the oldest driver that works with CUDA 13
REINSTALL = ".venv/bin/pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"


def nvidia_driver() -> str:
    """The version of the NVIDIA driver, such as 535.183.01; "" without a driver."""
    for name in NVIDIA_SMI:
        if not shutil.which(name):
            continue
        command = [name, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        version = re.match(r"\d+(\.\d+)+", done.stdout.strip())
        if done.returncode == 0 and version:
            return version[0]
    text = DRIVER_FILE.read_text(errors="replace") if DRIVER_FILE.exists() else ""
    version = re.search(r"Kernel Module.*?\s(\d+(\.\d+)+)", text)
    return version[1] if version else ""


def unusable_gpu() -> str:
    """Why torch cannot use the NVIDIA GPU of this machine, and what to do; "" if all is well."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden:
        return ""
    driver, cuda = nvidia_driver(), torch.version.cuda
    if not driver:
        return ""
    found = f"This machine has an NVIDIA GPU (driver {driver}), but torch {torch.__version__} cannot use it: "
    if cuda is None:
        found += "it was installed without CUDA (torch.version.cuda is None)."
    elif int(cuda.split(".")[0]) >= 13 and int(driver.split(".")[0]) < DRIVER_OF_CUDA_13:
        found += f"it was built for CUDA {cuda}, which needs driver {DRIVER_OF_CUDA_13} or newer."
    else:
        found += f"it was built for CUDA {cuda}. The GPU may be too old for it, or not in this container."
    return f"{found} Install the build for CUDA 12.6, which runs with driver 525 or newer:\n  {REINSTALL}"


def main() -> int:
    """Prints the default profile of run_all.sh. Returns 1, with a message, if the GPU cannot be used."""
    import torch

    if problem := unusable_gpu():
        print(f"run_all.sh: {problem}\nOr train on the CPU: bash run_all.sh cpu", file=sys.stderr)
        return 1
    if torch.cuda.is_available():
        print("speedrun")
        return 0
    if torch.backends.mps.is_available():
        note = "this Mac's GPU is not used by default; a single script uses it with --device=mps"
        print(f"run_all.sh: {note}", file=sys.stderr)
    print("cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
