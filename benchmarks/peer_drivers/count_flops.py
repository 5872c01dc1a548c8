"""`count_flops.py NAME FOLDER`: the operations of every pass of `speed_NAME.py`, by torch's counter, into `flops.json`."""

import importlib
import json
import sys
from pathlib import Path

import torch
from speed_handover import SAMPLED, TRUE, Handover, passes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

IN_PLACE = {  # torch's counter does not know them
    torch.ops.aten.addmm_: lambda total, a, b, *_, out_shape=None, **__: addmm_flop(total, a, b),
    torch.ops.aten.baddbmm_: lambda total, a, b, *_, out_shape=None, **__: baddbmm_flop(total, a, b),
}


def main(name: str, folder: Path) -> None:
    """Each pass once to have everything loaded, then once counted, with attention taken apart into its products."""
    torch.set_num_threads(1)
    handed = Handover(folder)
    counts = {}
    for kind, action in passes(handed, importlib.import_module(f"speed_{name}").actions).items():
        action(TRUE)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, sdpa_kernel(SDPBackend.MATH):
            action(SAMPLED)
        counts[kind] = counter.get_total_flops()
    (folder / "flops.json").write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
