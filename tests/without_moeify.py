"""Runs exported files on ranks where moeify cannot be imported: ``RANK RANKS STORE IN.pt OUT.pt FILE.pt2 ...``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the collectives' gradients


def main(rank: str, ranks: str, store: str, inputs: str, outputs: str, *files: str) -> None:
    sys.modules["moeify"] = None  # type: ignore[assignment]  # an import of it is an error from here on
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=int(ranks))
    x = torch.load(inputs)
    made = []
    for file in files:
        output = torch.export.load(file).module()(x)
        made.append(output[0] if isinstance(output, (tuple, list)) else output)
    torch.save([output.detach() for output in made], outputs)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
