"""Forward and backward in one ExecuTorch program, for the training extension of its runtime.

torch.export's joint graph, to portable kernels: XNNPACK has none for gradients. Source: ExecuTorch's training
extension, https://docs.pytorch.org/executorch (extension/training).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from slm_export.machine import machine_errors


def lower(step: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    """Write the program of one step; what requires a gradient gets one.

    Raises:
        MachineError: out of memory, or the disk is full.
    """
    from executorch.exir import EdgeCompileConfig, to_edge
    from torch.export import export
    from torch.export.experimental import _export_forward_backward

    with machine_errors("lower the training step", path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joint = _export_forward_backward(export(step, example, strict=False))
        _fill_empty(joint.graph_module)
        program = to_edge(joint, compile_config=EdgeCompileConfig(_check_ir_validity=False)).to_executorch()
        with path.open("wb") as file:
            program.write_to_file(file)


def _fill_empty(module: torch.fx.GraphModule) -> None:
    """Make tensors of nothing into tensors of zeros: the portable kernels have no ``empty_permuted``."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.empty_permuted.default:
            with module.graph.inserting_before(node):
                zeros = module.graph.call_function(
                    torch.ops.aten.full.default, (node.args[0], 0.0), {"dtype": node.meta["val"].dtype}
                )
            zeros.meta = dict(node.meta)
            node.replace_all_uses_with(zeros)
            module.graph.erase_node(node)
    module.recompile()
