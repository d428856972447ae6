"""A fake accelerator: its tensors say that they are on device "fake" and compute on the CPU inside.

It obeys CUDA's rules, so that code which passes on it mixes no devices: an operation takes no
tensors of the CPU but numbers and indices, no generator of the CPU, and nothing becomes NumPy
without `.cpu()`. It knows nothing of a real card's precision, memory, speed, or missing kernels.

`install` puts it in CUDA's place. PyTorch's hooks for backends written in Python are needed, which
are experimental: `MISSING` says what this PyTorch lacks.
"""

import torch
from torch.utils import backend_registration

from src import device

NAME = "fake"
COPIES = {"_to_copy", "copy_"}  # may see both devices
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Operations without a tensor among their arguments that PyTorch cannot build from `empty`.
FACTORIES = """empty.memory_format empty_strided arange arange.start arange.start_step eye eye.m
    randperm randperm.generator tril_indices triu_indices"""


class FakeTensor(torch.Tensor):
    """A tensor on the fake device; `held` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        kind = {"dtype": held.dtype, "device": torch.device(NAME, 0)}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, **kind)

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError(
            f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first."
        )

    __array__ = numpy

    def tolist(self):
        return self.detach().cpu().tolist()

    def __repr__(self):
        return repr(self.detach().cpu())

    def __format__(self, specification):
        return format(self.detach().cpu(), specification)

    def __reduce_ex__(self, protocol):
        arguments = self.detach().cpu(), self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        copy = torch.nn.Parameter(copy) if isinstance(self, torch.nn.Parameter) else copy
        return memo.setdefault(id(self), copy.requires_grad_(self.requires_grad))


def convert(function, value):
    """Apply a function to all that is in nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)([convert(function, x) for x in value])
    if isinstance(value, dict):
        return {key: convert(function, x) for key, x in value.items()}
    return function(value)


def hold(x):
    """What the CPU computes with."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, FakeTensor) else x


def execute(func, args, kwargs):
    """Compute an operation on the held tensors, after CUDA's checks."""
    if torch.is_inference_mode_enabled():  # where compound operations arrive whole
        out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    name, leaves = func._schema.name.removeprefix("aten::"), []
    convert(leaves.append, (args, kwargs))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    ours = any(isinstance(x, FakeTensor) for x in tensors)
    wanted = [x for x in leaves if isinstance(x, torch.device)]
    on_fake = wanted[0].type == NAME if wanted else ours
    if ours and name not in COPIES:
        strangers = [x for x in tensors if not isinstance(x, FakeTensor) and x.ndim]
        if name in INDEXING and isinstance(args[0], FakeTensor):  # its indices may be on the CPU
            strangers = [x for x in args[2:3] if any(x is y for y in strangers)]
        if strangers:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME} and cpu ({name} of {[tuple(x.shape) for x in strangers]})"
            )
    if on_fake and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found 'cpu' ({name})"
        )
    out = func(*convert(hold, args), **convert(hold, kwargs))
    if func._schema.is_mutable and out is not None:  # it gives what it has written to
        return kwargs.get("out", args[0])
    if not on_fake:
        return out
    with torch.inference_mode(False):  # so that a view of an ordinary tensor is one, too
        return convert(lambda x: FakeTensor(x) if isinstance(x, torch.Tensor) else x, out)


def register() -> torch.library.Library:
    """Tell PyTorch of the device; the registrations last as long as the library is kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    aten = torch.library.Library("aten", "IMPL")
    for name in FACTORIES.split():
        operation, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, operation), overload or "default")

        def make(*args, _func=func, **kwargs):
            return execute(_func, args, kwargs | {"device": torch.device(NAME, 0)})

        aten.impl(func, make, "PrivateUse1")

    def copy(source, target, non_blocking=False):
        return execute(torch.ops.aten.copy_.default, (target, source), {})

    aten.impl("_copy_from", copy, "PrivateUse1")
    return aten


MISSING = None
if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    MISSING = "this PyTorch has no hooks for backends written in Python"
else:  # now, because the first backward pass of a process fixes which devices there are
    _library = register()


def install(monkeypatch) -> torch.device:
    """Put the fake accelerator in the place of a card for profile `gpu`, in float32."""
    card = torch.device(NAME)
    monkeypatch.setattr(device, "choose", lambda *_: card)
    monkeypatch.setattr(device, "autocast_type", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake accelerator")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return card
