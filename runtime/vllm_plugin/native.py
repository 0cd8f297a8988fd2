"""Checkpoints in our native format, layer by layer, for vLLM.

Codes stay packed as they lie in the file until all shards of a layer are there; then the kernel
that qexport would take on this device prepacks them. Nothing is asked of vLLM's own parameter
classes, which change from release to release: what is loaded is placed by a function of ours.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from qexport import bits
from qexport.checkpoint import Modules, check_codes, check_scales, modules_from_json
from qexport.errors import CheckpointError
from qexport.grid import Scheme
from qexport.runtime.kernels.cpu import CpuKernel, CpuLinear
from qexport.runtime.kernels.dispatch import KERNELS, choose
from qexport.runtime.weights import Weight, joined
from qexport.tensor import QuantizedTensor

__all__ = ["NativeConfig", "NativeLinearMethod", "Shard"]

_log = logging.getLogger("vllm.qexport")
_SHARDS = {"q": 0, "k": 1, "v": 2}


class NativeConfig(QuantizationConfig):
    """`quantization_config` of a checkpoint that `qexport pack --format native` wrote."""

    def __init__(self, modules: Modules) -> None:
        super().__init__()
        self.modules = modules

    def __repr__(self) -> str:
        schemes = sorted({str(scheme) for scheme, _ in self.modules.values()})
        return f"NativeConfig({len(self.modules)} modules: {', '.join(schemes)})"

    def get_name(self) -> str:
        return "qexport"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NativeConfig":
        """Raises ValueError for what is not packed natively, or by a later qexport."""
        if config.get("format") != "native":
            raise ValueError(
                "this is a RUN of qexport, not a packed checkpoint; `qexport pack RUN --format "
                "native -o OUT` makes one that vLLM takes."
            )
        try:
            modules = modules_from_json(config)
        except CheckpointError as error:
            raise ValueError(str(error)) from error
        for name, (scheme, _) in modules.items():
            if not scheme.grid.uniform:
                raise ValueError(
                    f"{name} is on the grid {scheme.grid.name}, which no kernel under vLLM takes; "
                    "use qexport serve without --backend vllm."
                )
        return cls(modules)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Some of vLLM's models name their modules otherwise than the checkpoint."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """How a layer is served. Raises ValueError for one that is quantized and cannot be."""
        if isinstance(layer, LinearBase):
            shards = self._shards(prefix)
            if all(shard is None for shard in shards):
                return UnquantizedLinearMethod()
            return NativeLinearMethod(prefix, shards)
        if any(name == prefix or name.startswith(f"{prefix}.") for name in self.modules):
            raise ValueError(
                f"{prefix} is quantized, and under vLLM embeddings, heads and experts are served "
                "dense; keep it dense, or use qexport serve without --backend vllm."
            )
        return None

    def _shards(self, prefix: str) -> "list[Shard | None]":
        """What is stored of a module, which may be several of the checkpoint's, fused by vLLM."""
        if prefix in self.modules:
            return [Shard(*self.modules[prefix])]
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        found = [self.modules.get(f"{parent}.{part}") for part in parts]
        return [None if one is None else Shard(*one) for one in found]


@dataclass(frozen=True)
class Shard:
    """One matrix of the checkpoint: its scheme and [out, in]."""

    scheme: Scheme
    shape: tuple[int, int]


class NativeLinearMethod(LinearMethodBase):
    """A linear layer whose shards, each with a scheme of its own or dense, are stored packed."""

    def __init__(self, prefix: str, shards: list[Shard | None]) -> None:
        self._prefix, self._shards = prefix, shards
        self._linears: list[Any] = []
        self._placed: set[str] = set()  # parameters that the checkpoint had something for

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Room for what this rank holds. Raises ValueError where a group would be cut in two."""
        shards = self._shards
        if len(shards) == 1 and len(output_partition_sizes) > 1:
            shards = shards * len(output_partition_sizes)  # fused in the checkpoint already
        self._rows, self._inputs = output_partition_sizes, input_size_per_partition
        self._shards, self._dtype = shards, params_dtype
        self._first = 0  # input of this rank
        if input_size_per_partition != input_size:
            self._first = layer.tp_rank * input_size_per_partition
            for shard in shards:
                self._check_cut(shard, input_size // input_size_per_partition)
        layer.output_partition_sizes = output_partition_sizes
        for index, (shard, rows) in enumerate(zip(shards, output_partition_sizes, strict=True)):
            for name, (dtype, shape) in self._stored(shard, rows).items():
                empty = Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
                layer.register_parameter(f"{name}_{index}", empty)
        names = {k: dtype for shard in shards for k, (dtype, _) in self._stored(shard, 1).items()}
        for name, dtype in names.items():
            # the name in the checkpoint: an empty parameter that places what is loaded
            entry = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            vars(entry)["weight_loader"] = self._loader(layer, name)
            layer.register_parameter(name, entry)

    def _check_cut(self, shard: Shard | None, ranks: int) -> None:
        if shard is None:
            return
        group, width = shard.scheme.group_size, shard.scheme.grid.bits
        if (group is not None and self._inputs % group) or self._inputs * width % 8:
            raise ValueError(
                f"{self._prefix}: {ranks} ranks would each get {self._inputs} of its inputs, "
                f"which cuts groups of {group or 'a channel'} at {width} bits; use fewer ranks "
                "(--tensor-parallel-size) or train with smaller groups."
            )

    def _stored(
        self, shard: Shard | None, rows: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """Tensors of one shard: {name: (dtype, shape)}."""
        if shard is None:
            return {"weight": (self._dtype, (rows, self._inputs))}
        scheme = shard.scheme
        groups = (rows, scheme.groups(self._inputs))
        packed = (rows, bits.packed_bytes(self._inputs, scheme.grid.bits))
        found = {"qweight": (torch.uint8, packed), "scales": (scheme.scale_dtype, groups)}
        if scheme.grid.zeros:
            found["zeros"] = (torch.uint8, groups)
        return found

    def _loader(self, layer: Any, name: str) -> Callable[..., None]:
        """What vLLM calls for each of a layer's tensors called `name`, as it finds them."""

        def load(_: Parameter, loaded: Tensor, shard_id: Any = None) -> None:
            if shard_id is None or isinstance(shard_id, tuple):  # several, one after the other
                indices = shard_id or range(len(self._rows))
                sizes = [self._rows[at] * self._ranks(layer, at) for at in indices]
                for index, part in zip(indices, torch.split(loaded, sizes), strict=True):
                    place(index, part)
            else:
                place(_SHARDS.get(shard_id, shard_id), loaded)

        def place(index: int, loaded: Tensor) -> None:
            target = getattr(layer, f"{name}_{index}")
            first = self._rank(layer, index) * self._rows[index]
            part = self._columns(index, name, loaded[first : first + self._rows[index]])
            if part.shape != target.shape:
                raise ValueError(
                    f"{self._prefix}: {name} is {tuple(part.shape)} in the checkpoint, and the "
                    f"model wants {tuple(target.shape)}."
                )
            target.data.copy_(part)
            self._placed.add(f"{name}_{index}")

        return load

    def _columns(self, index: int, name: str, loaded: Tensor) -> Tensor:
        """This rank's inputs of a shard's tensor."""
        shard = self._shards[index]
        if shard is None:
            return loaded[:, self._first : self._first + self._inputs]
        scheme = shard.scheme
        if name == "qweight":
            first = self._first * scheme.grid.bits // 8
            return loaded[:, first : first + bits.packed_bytes(self._inputs, scheme.grid.bits)]
        first = 0 if scheme.group_size is None else self._first // scheme.group_size
        return loaded[:, first : first + scheme.groups(self._inputs)]

    def _ranks(self, layer: Any, index: int) -> int:
        """Parts that a shard's rows are shared out in."""
        return int(layer.tp_size // self._copies(layer, index)) if self._is_cut(layer) else 1

    def _rank(self, layer: Any, index: int) -> int:
        """Which of these parts is this rank's."""
        return int(layer.tp_rank // self._copies(layer, index)) if self._is_cut(layer) else 0

    def _copies(self, layer: Any, index: int) -> int:
        """Ranks that hold the same rows: keys and values, where they are fewer than ranks."""
        return int(getattr(layer, "num_kv_head_replicas", 1)) if index else 1

    def _is_cut(self, layer: Any) -> bool:
        return bool(layer.output_size != sum(self._rows))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Prepack: shards of one scheme together, as they are multiplied with the same input.

        Raises CheckpointError where a tensor is missing, of which vLLM keeps no account here, or
        holds what its grid does not have.
        """
        self._check_placed()
        weights: list[Weight] = [(self._weight(layer, n), None) for n in range(len(self._rows))]
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]:
            delattr(layer, name)
        self._linears = []
        for number, (weight, _) in enumerate(joined(weights)):
            linear = self._prepacked(weight)
            self._linears.append(linear)
            kept = weight if isinstance(weight, Tensor) else None
            if isinstance(linear, CpuLinear):
                kept = linear.packed  # by which the operator finds it
            if kept is not None:
                layer.register_parameter(f"part_{number}", Parameter(kept, requires_grad=False))

    def _check_placed(self) -> None:
        for index, shard in enumerate(self._shards):
            for name in self._stored(shard, 1):
                if f"{name}_{index}" not in self._placed:
                    raise CheckpointError(
                        f"{self._prefix}: the checkpoint lacks {name} of its part {index + 1}; it "
                        "is not whole."
                    )

    def _weight(self, layer: Any, index: int) -> QuantizedTensor | Tensor:
        shard = self._shards[index]
        if shard is None:
            return getattr(layer, f"weight_{index}").data  # type: ignore[no-any-return]
        grid = shard.scheme.grid
        codes = bits.unpack(getattr(layer, f"qweight_{index}").data, grid.bits, self._inputs)
        scales = getattr(layer, f"scales_{index}").data
        check_codes(codes, grid, self._prefix)
        check_scales(scales, self._prefix)
        zeros = getattr(layer, f"zeros_{index}").data if grid.zeros else None
        return QuantizedTensor(codes, scales, shard.scheme, zeros)

    def _prepacked(self, weight: QuantizedTensor | Tensor) -> Any:
        """The kernel's linear; None for a dense part, which torch multiplies."""
        if isinstance(weight, Tensor):
            return None
        device = weight.codes.device
        kernel = choose(weight.scheme, weight.shape, device, dtype=self._dtype).kernel
        if isinstance(kernel, CpuKernel):
            kernel = KERNELS["cpu-exact" if self._dtype == torch.float32 else "cpu"]
        _log.debug("%s: %s by %s", self._prefix, weight.scheme, kernel.name)
        return kernel.prepack(weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias` for x [..., in]."""
        rows = x.reshape(-1, x.shape[-1])
        found = []
        for number, linear in enumerate(self._linears):
            if linear is None:
                part = torch.nn.functional.linear(rows, getattr(layer, f"part_{number}"))
            elif isinstance(linear, CpuLinear):
                part = torch.ops.qexport.cpu_linear(
                    rows, getattr(layer, f"part_{number}"), linear.out_features
                )
            else:
                part = linear.matmul(rows)
            found.append(part)
        out = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias
