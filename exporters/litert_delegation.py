"""What XNNPACK takes of a LiteRT file, told by the interpreter that has handed it over."""

from __future__ import annotations

import importlib
import math
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slm_export.child import call, serve
from slm_export.delegation import Delegation
from slm_export.exporters.litert_container import Container


def delegation(path: Path) -> Delegation:
    """Return what is taken of the first function of a file; in a child, where packed weights trouble nobody."""
    found = call(__name__, {"path": str(path)}, f"see what XNNPACK takes of {path.name}")
    return Delegation(**found)


def _delegation(request: dict[str, Any]) -> dict[str, Any]:
    path = Path(request["path"])
    opened = Container.read(path).extracted() if path.suffix == ".litertlm" else nullcontext(path)
    with opened as model, TemporaryDirectory(prefix="slm-export-") as folder:
        alone = Path(folder) / "model.tflite"
        shutil.copyfile(model, alone)
        function = _keep_first(alone)
        interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(alone))
        interpreter.allocate_tensors()
        operators = interpreter._get_ops_details()
        shapes = {d["index"]: [int(n) for n in d["shape"]] for d in interpreter.get_tensor_details()}
    return {"delegate": "XNNPACK", "function": function, **_shares(operators, shapes)}


def _keep_first(path: Path) -> str:
    """Take every function but the first out of a flatbuffer, and return its name; weights stay where they are."""
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    model.signatureDefs = model.signatureDefs[:1]
    model.subgraphs = [model.subgraphs[model.signatureDefs[0].subgraphIndex]]
    model.signatureDefs[0].subgraphIndex = 0
    builder = importlib.import_module("flatbuffers").Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    with open(path, "r+b") as file:
        file.write(builder.Output())
    name: str = model.signatureDefs[0].signatureKey.decode()
    return name


def _shares(operators: list[dict[str, Any]], shapes: dict[int, list[int]]) -> dict[str, Any]:
    own = [op for op in operators if op["op_name"] != "DELEGATE"]
    maker = {int(tensor): op for op in own for tensor in op["outputs"]}
    taken: set[int] = set()
    for delegate in (op for op in operators if op["op_name"] == "DELEGATE"):
        given = {int(tensor) for tensor in delegate["inputs"]}
        waiting = [int(tensor) for tensor in delegate["outputs"]]
        while waiting:
            op = maker.get(tensor := waiting.pop())
            if op is not None and tensor not in given and op["index"] not in taken:
                taken.add(op["index"])
                waiting += [int(tensor) for tensor in op["inputs"]]
    products = {op["index"]: _multiplications(op, shapes) for op in own}
    return {
        "operators": len(own),
        "taken": len(taken),
        "multiplications": sum(products.values()),
        "taken_multiplications": sum(products[index] for index in taken),
        "rest": Counter(op["op_name"] for op in own if op["index"] not in taken),
    }


def _multiplications(op: dict[str, Any], shapes: dict[int, list[int]]) -> int:
    """Return the multiply-adds of a matrix product; everything else has none to speak of."""
    if op["op_name"] not in ("FULLY_CONNECTED", "BATCH_MATMUL"):
        return 0
    return math.prod(shapes[int(op["outputs"][0])]) * shapes[int(op["inputs"][0])][-1]


if __name__ == "__main__":
    serve(_delegation)
