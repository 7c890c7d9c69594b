"""Is there a GPU, can it run the kernels, and does the model fit: answered before a weight is read, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

MIN_CAPABILITY = (8, 0)  # bf16 and cp.async: Ampere and later; nothing older is tested


class DeviceError(RuntimeError):
    """The device that was asked for is absent, too old or too small. The message says what to do."""


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the first GPU that can run the kernels, or the CPU."""
    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise DeviceError(f"{name!r} is not a device; name cuda, cuda:1 or cpu") from None
        check_device(device)
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    usable = torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= MIN_CAPABILITY
    return torch.device("cuda:0" if usable else "cpu")


def check_device(device: torch.device) -> None:
    """DeviceError when `device` is a GPU that is absent or too old; other devices pass."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise DeviceError(
            "PyTorch sees no CUDA device: install an NVIDIA driver and a CUDA build of torch, or use device cpu"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no {device}: PyTorch sees {torch.cuda.device_count()} CUDA device(s)")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, needed = (f"{major}.{minor}" for major, minor in (capability, MIN_CAPABILITY))
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found} and the kernels need {needed} "
            "(Ampere or later); use device cpu"
        )


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """DeviceError when a GPU has fewer than `needed` bytes free for `what`."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # ours to use again
    if needed > free:
        raise DeviceError(
            f"{what} needs {needed / 2**30:.2f} GiB and {device} has {free / 2**30:.2f} GiB free; close what else uses "
            "the GPU, choose fewer bits, or use device cpu"
        )


def devices_of(device_map: object) -> Iterator[torch.device]:
    """The devices that a transformers device_map names; "auto" and the like name none."""
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        if isinstance(place, torch.device):
            yield place
        elif isinstance(place, int) and not isinstance(place, bool):
            yield torch.device("cuda", place)
        elif isinstance(place, str) and place.startswith(("cuda", "cpu")):
            yield torch.device(place)
