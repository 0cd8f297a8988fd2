"""transformers reads and writes the native format once this module is imported.

    import qexport.hf
    model = AutoModelForCausalLM.from_pretrained("packed")   # qexport pack --format native
    model.save_pretrained("copy")                            # the same bytes again

Every quantized linear layer keeps its packed codes and dequantizes them when it is called, by the
project's one definition. transformers has no entry points: without the import it logs a warning
and fills the layers with random numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qexport.checkpoint import modules_from_json
from qexport.errors import CheckpointError
from qexport.formats.native import Native, check_tensor, decoded
from qexport.grid import Scheme
from qexport.tensor import QuantizedTensor

__all__ = ["PackedLinear", "QexportConfig", "QexportQuantizer"]


@register_quantization_config("qexport")
class QexportConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint, field for field as in formats/SPEC.md."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = "qexport"
        self.format = fields.get("format")
        self.version = fields.get("version")
        self.config_groups = fields.get("config_groups")

    def to_dict(self) -> dict[str, Any]:
        """The fields in the order of the specification."""
        return dict(self.__dict__)


class PackedLinear(nn.Module):
    """A linear layer of a native checkpoint: the buffers of that layout, and perhaps a `bias`."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = shape
        for name, (dtype, sides) in Native().parts("", scheme, shape).items():
            self.register_buffer(name.removeprefix("."), torch.empty(sides, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [out, in]."""
        return self.quantized().dequantize(dtype)

    def quantized(self) -> QuantizedTensor:
        """What the buffers hold."""
        parts = {f".{name}": buffer for name, buffer in self.named_buffers(recurse=False)}
        return decoded("", parts, self.scheme, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """`to` and its like: buffers go to another device, and keep their dtypes."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] times the weight, in the dtype of `x`."""
        return nn.functional.linear(x, self.weight_in(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


def _linear(model: Any, name: str) -> nn.Linear:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise CheckpointError(f"the checkpoint quantizes {name}, and the model has no such linear.")
    return found


@register_quantizer("qexport")
class QexportQuantizer(HfQuantizer):
    """Puts PackedLinear where the checkpoint has quantized modules."""

    requires_calibration = True  # loads what is quantized, and quantizes nothing itself

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config.to_dict()
        if config.get("format") != "native":
            raise CheckpointError(
                "a RUN holds latent weights; qexport pack --format native makes of it what "
                "from_pretrained loads."
            )
        for name, (scheme, shape) in modules_from_json(config).items():
            linear = _linear(model, name)
            if (linear.out_features, linear.in_features) != shape:
                raise CheckpointError(f"{name} is {list(shape)}, and the model has {linear}.")
            with torch.device("meta"):
                packed = PackedLinear(scheme, shape, linear.bias is not None)
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in model.named_modules():
            # what is left on a disk until it is wanted is not looked at
            if isinstance(module, PackedLinear) and not module.scales.is_meta:
                check_tensor(module.quantized(), name)
        return model

    def is_serializable(self) -> bool:
        """Packed buffers are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False
