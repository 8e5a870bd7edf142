"""Lower a decoder in a time that hardly depends on its depth.

ExecuTorch's passes interpret a graph node by node, many times over: seconds per layer, whatever its width. Here
a decoder of equal layers is lowered with two of them, and the program of all is put together from that
(`executorch_stamp`). A decoder whose layers differ is lowered whole, by the same pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram

from slm_export.checkpoint import Checkpoint
from slm_export.exporters.executorch_file import Contents, write_program
from slm_export.exporters.executorch_names import add_names
from slm_export.exporters.executorch_places import METHOD
from slm_export.exporters.executorch_stamp import lowered_modules, stamped
from slm_export.exporters.executorch_stand_in import stand_in
from slm_export.graph.layers import CannotStamp, check_alike, hollow, layers_of

_ALIGNMENT = 128
"""Of segments in the file, in bytes; ExecuTorch's own default."""

Build = Callable[[Checkpoint], nn.Module]
Trace = Callable[[nn.Module], ExportedProgram]


def lower_decoder(
    checkpoint: Checkpoint, build: Build, trace: Trace, constants: Mapping[str, Any], path: Path
) -> str | None:
    """Write a decoder; return why every layer had to be lowered, or None if two were enough.

    Given   build: checkpoint -> module, its transformers model at ``.model``
            trace: module -> torch.export's graph
    """
    contents: Contents = {}
    try:
        (edge, contents), reason = _stamped(checkpoint, build, trace, constants), None
    except CannotStamp as error:
        edge, reason = to_edge(trace(build(checkpoint)), constants), str(error)
    write(edge, checkpoint, path, contents)
    return reason


def to_edge(program: ExportedProgram | dict[str, ExportedProgram], constants: Mapping[str, Any]) -> Any:
    """Return the edge program with XNNPACK's partitions lowered; of several by the names of their methods.

    Two hints that both are ExecuTorch's own make it some three times as fast:
    the only operator to be kept whole is named without a condition, which saves one decomposition of three;
    the compile specification restricts XNNPACK's passes on each partition to one of seventeen. The others are for
    convolutions, pooling, batch norm and activations fused into them, and for copies, which go before.
    """
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    class Partitioner(XnnpackPartitioner):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            only_linear = CompileSpec("dqlinear_partitioner", b"")
            self.delegation_spec: Any = DelegationSpec("XnnpackBackend", [only_linear])

        def ops_to_not_decompose(self, program: ExportedProgram) -> tuple[list[Any], None]:
            return [torch.ops.aten.linear.default], None

    edge = to_edge_transform_and_lower(
        program,
        # Dropout leaves a copy behind, which XNNPACK cannot lower.
        transform_passes=[RemoveCloneOpsTransform(preserve_input_output_copies=True)],
        partitioner=[Partitioner()],
        # The operators of `llama` and `quantized_decomposed` are not core ATen, and rightly so.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=dict(constants),
    )
    for method in edge.methods:
        for _, lowered in lowered_modules(edge.exported_program(method)):
            lowered.compile_specs.clear()  # a hint to the compiler is nothing to store in the file
    return edge


def write(
    edge: Any,
    checkpoint: Checkpoint,
    path: Path,
    contents: Contents = MappingProxyType({}),
    entries: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Name the weights, plan memory, emit, and write with the large constants in their places.

    Given   entries: further named data, which no runtime asks for
    """
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    planning = ExecutorchBackendConfig().memory_planning_pass
    config = ExecutorchBackendConfig(
        # Matrices of an adapter are used where the app has them, and not copied for every token.
        memory_planning_pass={
            method: MemoryPlanningPass(alloc_graph_input=False) if method == METHOD else planning
            for method in edge.methods
        },
        # Weights in a segment of their own are mapped, and freed once XNNPACK has packed them.
        extract_delegate_segments=True,
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        # A tensor may lie where a segment is wanted.
        constant_tensor_alignment=_ALIGNMENT,
        segment_alignment=_ALIGNMENT,
    )
    add_names(edge, checkpoint)
    for key, data in entries.items():
        edge._named_data_store.add_named_data(key, data)
    emitted = path.with_name(f"{path.name}.emitted")
    with open(emitted, "wb") as file:
        edge.to_executorch(config).write_to_file(file)
    write_program(emitted, path, contents, _ALIGNMENT)
    emitted.unlink()


def _stamped(
    checkpoint: Checkpoint, build: Build, trace: Trace, constants: Mapping[str, Any]
) -> tuple[Any, Contents]:
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager

    layers = layers_of(checkpoint)
    every = build(hollow(checkpoint))
    check_alike(every, layers)
    substitute = stand_in(checkpoint, layers)
    module = build(substitute)
    stack = cast(nn.ModuleList, module.get_submodule(layers.path))
    module.set_submodule(layers.path, stack[:2])
    two = to_edge(trace(module), constants).exported_program()
    del module, stack
    tensors = {**dict(every.named_parameters()), **dict(every.named_buffers())}
    program, contents = stamped(two, layers, checkpoint, substitute, tensors)
    # Skipped with `_skip_dim_order`: a pass that makes layouts of images contiguous.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    return EdgeProgramManager(program, dict(constants), config), contents
