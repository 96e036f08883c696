"""The device mesh of a layout: data outermost, then pipeline, context and tensor (innermost).

With hybrid sharding the data dimension is two: copies outermost, then the shards of a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ir.errors import InputError
from ir.parallelism import ORDER, Layout


@dataclass(frozen=True)
class Meshes:
    """A rank's place and its communicators; a dimension of size 1 has a group of one.

    Attributes:
        root: all ranks, dimensions named as in :data:`ir.parallelism.ORDER`; "data" is "copies" and "shards" where
            there are several copies.
        replicas: what FSDP shards over, None where that is one rank: one dimension of context x data ranks, or two,
            copies and the shards of a copy.
    """

    root: DeviceMesh
    replicas: DeviceMesh | None

    def index(self, dimension: str) -> int:
        """This rank's coordinate."""
        if dimension == "data" and "data" not in (self.root.mesh_dim_names or ()):
            return self.index("copies") * self.size("shards") + self.index("shards")
        return int(self.root.get_local_rank(dimension))

    def size(self, dimension: str) -> int:
        """Ranks of the dimension."""
        return int(self.root[dimension].size())

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The communicator of this rank along the dimension."""
        return self.root.get_group(dimension)


def make_meshes(layout: Layout, device: str = "cpu") -> Meshes:
    """The mesh over the default process group.

    Raises:
        InputError: the group has another size than the layout.
    """
    world = dist.get_world_size()
    if world != layout.world:
        raise InputError(
            f"the plan is for {layout.world} ranks ({layout.label}), the process group has {world}"
        )
    names = tuple(reversed(ORDER))
    from torch.distributed.device_mesh import init_device_mesh

    if layout.replicate > 1:
        return _hybrid(layout, device)
    root = init_device_mesh(device, tuple(getattr(layout, name) for name in names), mesh_dim_names=names)
    replicas = None
    if layout.replicas > 1:
        # also where one of the two has size 1: FSDP then sees one dimension in every layout
        replicas = root["data", "context"]._flatten("replicas")
    return Meshes(root, replicas)


def _hybrid(layout: Layout, device: str) -> Meshes:
    from torch.distributed.device_mesh import init_device_mesh

    sizes = (layout.replicate, layout.data // layout.replicate)
    inner = tuple(name for name in reversed(ORDER) if name != "data")
    root = init_device_mesh(
        device,
        (*sizes, *(getattr(layout, name) for name in inner)),
        mesh_dim_names=("copies", "shards", *inner),
    )
    root["shards", "context"]._flatten("sharded")
    return Meshes(root, root["copies", "sharded"])
