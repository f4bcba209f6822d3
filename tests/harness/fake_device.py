"""A GPU that is not there: tensors `on` it are the CPU's, and whatever would wait for a GPU is noted.

Such a tensor says that its device is GPU, and what is computed from it or made there is on it as well. Noted as waits:
values that the host reads (item, tolist, bool, cpu, ...), operations whose result's size depends on values (nonzero,
masks as indices, bincount, ...), copies to it other than from pinned memory with non_blocking, which wait for what the
device has to do, and operations between tensors on it and on the CPU, which would fail.
"""

import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
SIZE_BY_VALUE = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
    "equal",
    "_local_scalar_dense",
    "repeat_interleave",
    "is_nonzero",
}
FROM_HOST_DATA = {"tensor", "as_tensor", "from_numpy"}


class FakeDevice(TorchFunctionMode):
    """`waits`: (what, where) of each while the context is entered. `put(tensors)` declares what is on the device."""

    def __init__(self):
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.on: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no address is used again
        self.pinned: dict[int, torch.UntypedStorage] = {}
        self.dispatch = Dispatch(self)

    def __enter__(self):
        super().__enter__()
        self.dispatch.__enter__()
        return self

    def __exit__(self, *error):
        self.dispatch.__exit__(*error)
        return super().__exit__(*error)

    def put(self, *tensors: torch.Tensor) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            self.on[storage._cdata] = storage

    def has(self, x) -> bool:
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.on

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.waits.append((what, f"{frames[-1].filename.split('site-packages/')[-1]}:{frames[-1].lineno}"))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        if func == torch.Tensor.device.__get__:
            return GPU if self.has(x) else func(*args)
        if name in READS and self.has(x):
            self.note(name)
        if func == torch.Tensor.cpu and self.has(x):
            self.note("cpu")
            return self.off(x.clone())
        if func == torch.Tensor.to:
            return self.to(func, x, args, kwargs)
        made_there, pin = kwargs.get("device") == GPU, kwargs.pop("pin_memory", False) or name == "pin_memory"
        if made_there:
            kwargs["device"] = HOST
            if name in FROM_HOST_DATA:
                self.note(f"torch.{name} of host data")
        out = x.clone() if name == "pin_memory" else func(*args, **kwargs)
        if pin:
            self.pinned[out.untyped_storage()._cdata] = out.untyped_storage()
        if made_there:
            self.put(*(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)))
        return out

    def to(self, func, x, args, kwargs):
        given = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, (torch.device, str))]
        given += [GPU if self.has(a) else a.device for a in args[1:] if isinstance(a, torch.Tensor)]
        args = [HOST if isinstance(a, torch.device) else a for a in args]
        kwargs = {k: HOST if k == "device" else v for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if not given or (torch.device(given[0]) == GPU) == self.has(x):
            return out
        if torch.device(given[0]) != GPU:
            if any(
                "/torch/optim/" in f.filename or "/torch/nn/utils/" in f.filename for f in traceback.extract_stack()
            ):
                # These ask torch's C++ for the device.
                return out
            self.note("to the host")
            return self.off(out.clone())
        if not (kwargs.get("non_blocking") and x.untyped_storage()._cdata in self.pinned):
            self.note("to the device from pageable memory")
        out = out.clone()
        self.put(out)
        return out

    def off(self, x: torch.Tensor) -> torch.Tensor:
        self.on.pop(x.untyped_storage()._cdata, None)
        return x


class Dispatch(TorchDispatchMode):
    """What torch calls by itself, autograd included."""

    def __init__(self, fake: FakeDevice):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fake, name = self.fake, func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if fake.has(t)]
        if here:
            if name in SIZE_BY_VALUE:
                fake.note(name)
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
                indices = [i for i in args[1] if i is not None]
                if any(i.dtype in (torch.bool, torch.uint8) and fake.has(i) for i in indices) and name == "index":
                    fake.note("a mask as index")
                if not all(fake.has(i) for i in indices):
                    fake.note("an index on the host")
            elif any(t.ndim and not fake.has(t) for t in tensors):
                fake.note("copy_ from the host" if name == "copy_" else f"{name} of tensors on two devices")
        out = func(*args, **(kwargs or {}))
        if here:
            fake.put(*(t for t in tree_leaves(out) if isinstance(t, torch.Tensor)))
        return out
