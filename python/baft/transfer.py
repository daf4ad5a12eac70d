"""Between the host and the device, neither waiting for the other."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Reading", "sent"]


def sent(values: object, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, nested as ``torch.tensor`` takes them, as a tensor that is on its way to ``device``."""
    # From memory that isn't pinned a copy would wait for all that the device has been told to do before.
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class Reading:
    """A tensor's values as they are now, on their way to the host.

    Args:
        values: a tensor; what is written to it later isn't read.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.current_stream(values.device).record_event()
        else:
            self._values = values.detach().clone()

    def values(self) -> list[float]:
        """The values, which are waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._values.tolist()
        return found
