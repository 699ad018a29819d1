"""Runs a script as if this computer had a GPU, an RTX 3060, to find mistakes that only show on one.

    python tests/pretend_gpu.py train.py --tokens=out/tokens --device=cuda --compile=False --max_steps=4

A tensor on cuda:0 holds one on the CPU, which computes. torch does not know: autocast, autograd and our own
code take their branches for CUDA. At the end the attention kernels are listed that torch would choose on the
GPU. The exit status is 1 if the script did what CUDA refuses, even if it caught the error:

- an operation on tensors of both devices (a CPU tensor may be a number without dimensions, or an index),
  random numbers for the GPU from a generator of the CPU, `.numpy()` of a GPU tensor;
- while a CUDA graph is recorded, a copy between host and GPU, or a result that the host waits for.

It cannot find what lies in the GPU itself: its kernels and their rounding, torch.compile, memory, speed, and
copies that are read before they have arrived. It needs Linux and a C++ compiler, once, for two seconds.
"""

import collections
import contextlib
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import types
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load_hooks() -> None:
    """Compiles pretend_gpu.cpp, once for every torch, and loads it. Later torch would not look for it."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    source, version = HERE / "pretend_gpu.cpp", torch_folder / "version.py"
    key = zlib.crc32(source.read_bytes() + version.read_bytes() + bytes(torch_folder))
    library = HERE / f"__pycache__/pretend_gpu-{key}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        mine = library.with_suffix(f".{os.getpid()}")  # several processes may begin at the same time
        folders = f"-I{torch_folder}/include -L{torch_folder}/lib -Wl,-rpath,{torch_folder}/lib"
        command = ["c++", "-std=c++20", "-shared", "-fPIC", *folders.split(), source, "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, "-o", mine], check=True)
        mine.replace(library)
    ctypes.CDLL(str(library))


load_hooks()

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import torch.cuda.amp.common  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
refused = []  # what CUDA does not do
chosen = collections.Counter()  # attention kernels
graphs = []  # CUDA graphs
recording = None  # the one that is being recorded


def refuse(message: str, kind: type[Exception] = RuntimeError) -> None:
    refused.append(message)
    raise kind(message)


# -----------------------------------------------------------------------------
# Tensors and operations


class GPUTensor(torch.Tensor):
    """Says that it is on cuda:0; `held`, on the CPU, has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="cuda:0", **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    # What torch does without an operation:

    def numpy(self, *args, **kwargs):
        refuse("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first", TypeError)

    __array__ = numpy

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, index):
        return super().__getitem__(without_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(without_lists(index), value)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = GPUTensor(self.held.clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(twin, self.requires_grad) if is_parameter else twin
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # torch.save
        return self.held.detach().clone().__reduce_ex__(protocol)

    def __repr__(self):
        return f"GPUTensor({self.held})"


def without_lists(index):
    """x[[0, 2]], x[:, [0, 2]]: torch would make the lists tensors on the device of x."""
    if isinstance(index, tuple):
        return tuple(map(without_lists, index))
    return torch.LongTensor(index) if isinstance(index, list) else index


class Everywhere(TorchDispatchMode):
    """Brings operations without a GPU tensor to `compute`, too: they may make one."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or the first operation loads the compiler, which takes two seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def tensors_of(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def compute(func, args, kwargs):
    """An operation on what the GPU tensors hold; the result is on the GPU if it has to be."""
    name = func.overloadpacket.__name__
    inputs = tensors_of((args, kwargs))
    on_gpu = {id(x.held): x for x in inputs if isinstance(x, GPUTensor)}
    device = kwargs.get("device")
    check(name, args, inputs, device)
    to_gpu = args[0].is_cuda if name == "copy_" else bool(on_gpu)
    if device is not None:
        to_gpu = device.type == "cuda"
        kwargs = kwargs | {"device": torch.device("cpu") if to_gpu else device}
    if to_gpu and kwargs.get("generator") is not None:
        refuse(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")

    args, kwargs = tree_map(lambda x: x.held if isinstance(x, GPUTensor) else x, (args, kwargs))
    if recording and to_gpu:
        changed = [x for x, about in zip(args, func._schema.arguments, strict=False) if about.is_write]
        recording.before += [(x, x.clone()) for x in tensors_of(changed)]
    result = func(*args, **kwargs)
    if recording and to_gpu:
        recording.steps.append((func, args, kwargs, result))

    def on_device(x):
        if not to_gpu or not isinstance(x, torch.Tensor):
            return x
        return on_gpu[id(x)] if id(x) in on_gpu else GPUTensor(x)  # the first: changed in place

    return tree_map(on_device, result)


def check(name: str, args, inputs: list[torch.Tensor], device: torch.device | None) -> None:
    """Refuses what CUDA does."""
    places = {x.device.type for x in inputs}
    indices = tensors_of(args[1]) if name in INDEXED else []
    if recording and name in COPIES and len(places | {device.type} if device else places) > 1:
        refuse(f"{name}: a copy between host and GPU while a CUDA graph is recorded")
    waits = name in WAITS or any(x.is_cpu or x.dtype == torch.bool for x in indices)
    if recording and "cuda" in places and waits:
        refuse(f"{name}: the host waits for the GPU while a CUDA graph is recorded")
    if name in INDEXED and args[0].is_cuda:
        inputs = tensors_of((args[0], args[2:]))  # the indices may be on the CPU
    strangers = [tuple(x.shape) for x in inputs if x.is_cpu and x.dim()]
    if "cuda" in places and strangers and name not in COPIES:
        refuse(f"{name}: all tensors have to be on the same device, but shapes {strangers} are on the CPU")


def attention_kernel(q, k, v, mask=None, dropout=0.0, causal=False, enable_gqa=False) -> str:
    """What torch chooses on a GPU of compute capability 8.6 (ATen/native/transformers/cuda/sdp_utils.cpp).

    "math" keeps all scores, (B, H, T, T).
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    same_heads = q.shape[1] == k.shape[1]
    square = q.shape[2] == k.shape[2]
    D = q.shape[3]
    kernel = "math"
    if all(x.stride(-1) == 1 for x in (q, k, v)):
        if half and mask is None and D <= 256 and (same_heads or enable_gqa) and (square or not causal):
            kernel = "flash"
        elif same_heads and D % (8 if half else 4) == 0:
            kernel = "efficient"
    use = "training" if torch.is_grad_enabled() else "no gradient"
    return f"{kernel}, {use}, {'no mask' if mask is None else 'masked'}, {dtype}, {D} numbers a head"


class Graph:
    """torch.cuda.CUDAGraph: the operations of a recording, done again on the same tensors."""

    def __init__(self):
        self.steps = []  # (operation, arguments, its result)
        self.before = []  # CUDA computes nothing while it records, so what was changed is put back

    @contextlib.contextmanager
    def record(self):
        global recording
        recording = self
        try:
            yield
        finally:
            recording = None
            for x, numbers in reversed(self.before):
                x.copy_(numbers)
        graphs.append(self)

    def replay(self) -> None:
        with _disable_current_modes():  # straight to the CPU
            for func, args, kwargs, result in self.steps:
                again = func(*args, **kwargs)
                for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                        old.copy_(new)


# -----------------------------------------------------------------------------
# What is replaced in torch

GIB = 2**30
ANSWERS = {
    "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "device_count": 1,
    "current_device": 0, "get_device_name": "NVIDIA GeForce RTX 3060", "get_device_capability": (8, 6),
    "is_bf16_supported": True, "mem_get_info": (11 * GIB, 12 * GIB), "memory_reserved": GIB,
    "memory_allocated": GIB, "max_memory_allocated": GIB, "get_per_process_memory_fraction": 1.0,
    "max_memory_reserved": GIB, "get_device_properties": types.SimpleNamespace(total_memory=12 * GIB),
    "set_per_process_memory_fraction": None, "set_device": None,
    "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
    "manual_seed": None, "manual_seed_all": None,
}  # fmt: skip


def install() -> None:
    """From now on torch has a GPU."""
    make, load, save = torch.tensor, torch.load, safetensors.torch.save_file
    attend = F.scaled_dot_product_attention

    def tensor(data, dtype=None, device="cpu", requires_grad=False):
        return make(data, dtype=dtype).to(device).requires_grad_(requires_grad)

    def loaded(file, map_location="cpu", **kwargs):
        found = load(file, map_location="cpu", **kwargs)
        return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, found)

    def save_file(tensors, *args, **kwargs):
        save({name: x.cpu() for name, x in tensors.items()}, *args, **kwargs)

    def attention(*args, **kwargs):
        if args[0].is_cuda:
            chosen[attention_kernel(*args, **kwargs)] += 1
        return attend(*args, **kwargs)

    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, Graph.record
    torch.tensor, torch.load, F.scaled_dot_product_attention = tensor, loaded, attention
    torch.Tensor.pin_memory = lambda x: x
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # they become tensors of another class
    safetensors.torch.save_file = save_file
    sys.modules["bitsandbytes"] = None  # peft would load it, and it CUDA
    Everywhere().__enter__()


def main() -> int:
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(HERE.parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        for about, calls in chosen.items():
            print(f"attention by {about}: {calls} calls")
        print(f"CUDA graphs recorded: {len(graphs)}")
        for message in refused:
            print(f"refused: {message}")
    return bool(refused)


if __name__ == "__main__":
    sys.exit(main())
