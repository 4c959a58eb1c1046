"""A bound module under FSDP2: dense parameters cut over all ranks, a rank's experts over the ranks that hold the same.

The recipe, which ``torch.distributed.fsdp.fully_shard`` does not apply by itself: it divides expert gradients by the
size of ``dp`` alone, so that they come out ep times too large against the dense ones. Here nothing is divided; divide
the loss by the number of ranks.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from moeify.distributed.binding import binding_of
from moeify.errors import BadOption
from moeify.ir.roles import DATA, EXPERTS


def fully_shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut a bound module's parameters over a mesh (dp, ep), in place.

    After it: ``(loss / mesh.size()).backward()`` with the mean loss of the rank's own tokens, and no
    ``sync_gradients``. ``gradient_norm`` and ``clip_gradients`` work as before. Raises BadOption for a mesh without
    ``dp``.
    """
    names = mesh.mesh_dim_names or ()
    if tuple(names) != (DATA, EXPERTS):
        raise BadOption(
            f"the dimensions of the mesh are named {', '.join(names) or 'nothing'}",
            hint="make it with mesh_dim_names=('dp', 'ep')",
        )
    experts = {p for name, p in module.named_parameters() if name in binding_of(module).sharding.parameters}
    over_data = FSDPMeshInfo(mesh[DATA], shard_mesh_dim=0)

    def place(parameter: nn.Parameter) -> ShardPlacementResult | None:
        return ShardPlacementResult(Shard(0), over_data) if parameter in experts else None

    torch_fully_shard(module, mesh=_flat(mesh), shard_placement_fn=place)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return module


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks in one dimension."""
    return DeviceMesh(mesh.device_type, torch.as_tensor(mesh.mesh).flatten(), mesh_dim_names=("all",))
