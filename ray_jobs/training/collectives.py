"""The process group of Ray Train's workers, by what their torch sees rather than by what Ray reserved for them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


@dataclass
class CollectivesByDevice(TorchConfig):
    """Ray's own, but NCCL only where every worker has a CUDA device: it refuses to start without one."""

    @property
    def backend_cls(self) -> Any:
        return _BackendByDevice


class _BackendByDevice(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:  # type: ignore[override]  # as Ray's
        cuda = all(worker_group.execute(torch.cuda.is_available))
        super().on_start(worker_group, replace(backend_config, backend="nccl" if cuda else "gloo"))
