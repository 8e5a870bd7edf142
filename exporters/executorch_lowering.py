"""torch.export's graph -> ``.pte``, through XNNPACK."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def lower(program: ExportedProgram, constants: Mapping[str, Any], path: Path) -> None:
    """Lower a graph and write it, with ``constants`` as constant methods."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    edge = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        # The operators of `llama` and `quantized_decomposed` are not core ATen, and rightly so.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=dict(constants),
    )
    executable = edge.to_executorch(
        ExecutorchBackendConfig(
            # Weights in a segment of their own are mapped, and freed once XNNPACK has packed them.
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    with open(path, "wb") as file:
        executable.write_to_file(file)
