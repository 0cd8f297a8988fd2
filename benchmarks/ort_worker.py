"""onnxruntime's MatMulNBits, run by `.venv-bench`: a line of JSON in, the seconds of a pass out.

The first line describes the matrices: bits, group, n, k, m, copies, passes, threads. Each further
line asks for `passes` passes over all copies, one after the other.
"""

import json
import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def session(asked: dict[str, int]) -> onnxruntime.InferenceSession:
    """`copies` independent MatMulNBits over one input, with int8 activations."""
    bits, group, n, k = (asked[key] for key in ("bits", "group", "n", "k"))
    random = np.random.default_rng(0)
    nodes, tensors, outputs = [], [], []
    for copy in range(asked["copies"]):
        codes = random.integers(0, 256, (n, k // group, group * bits // 8), dtype=np.uint8)
        scales = (random.random(n * k // group, dtype=np.float32) * 0.01).astype(np.float32)
        tensors.append(numpy_helper.from_array(codes, f"b{copy}"))
        tensors.append(numpy_helper.from_array(scales, f"s{copy}"))
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"b{copy}", f"s{copy}"],
                [f"y{copy}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=bits,
                block_size=group,
                accuracy_level=4,
            )
        )
        outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, ["m", n]))
    graph = helper.make_graph(
        nodes,
        "peer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        outputs,
        tensors,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked["threads"]
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def main() -> None:
    """Serve standard input."""
    asked = json.loads(sys.stdin.readline())
    try:
        run = session(asked)
    except Exception as error:
        print(json.dumps({"error": str(error).splitlines()[0]}), flush=True)
        return
    feed = {"x": np.random.default_rng(1).random((asked["m"], asked["k"]), dtype=np.float32)}
    run.run(None, feed)
    print(json.dumps({"version": onnxruntime.__version__}), flush=True)
    for _ in sys.stdin:
        run.run(None, feed)  # wakes threads up
        start = time.perf_counter()
        for _ in range(asked["passes"]):
            run.run(None, feed)
        matrices = asked["passes"] * asked["copies"]
        print(json.dumps((time.perf_counter() - start) / matrices), flush=True)


if __name__ == "__main__":
    main()
