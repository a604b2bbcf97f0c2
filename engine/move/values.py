"""Changing values: the cast that `--dtype` asks for and the registry of transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, Place
from engine.formats.headers import ITEM_SIZES
from engine.planning.model import Output

if TYPE_CHECKING:
    import numpy as np


def float_type(dtype: str) -> np.dtype[Any]:
    """The numpy type of a safetensors float type."""
    import ml_dtypes
    import numpy as np

    kinds: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    found: np.dtype[Any] = np.dtype(kinds[dtype])
    return found


_RANGES = ("F16", "BF16", "F32", "F64")  # each holds larger numbers than the one before
_LARGEST = {"F16": ("float16", "65504"), "BF16": ("bfloat16", "3.39e+38"), "F32": ("float32", "3.40e+38")}


def normalize(rows: np.ndarray, axis: str = "") -> np.ndarray:
    """Rows scaled to length 1 (L2), in float32, as InternEvo's norm_head does at run time.

    >>> import numpy as np
    >>> normalize(np.array([[3.0, 4.0]], np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    import numpy as np

    length = np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True, dtype=np.float32))
    return rows / np.maximum(length, np.float32(1e-12))


def add(rows: np.ndarray, number: str) -> np.ndarray:
    """Each value and a number, as Transformer Engine's norms add 1 in float32."""
    import numpy as np

    return rows + np.float32(number)


# Operation of `language.rules` → function of float32 rows along the last storage dimension and the rule's argument.
FUNCTIONS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {"normalize": normalize, "add": add}


def check_transform(output: Output) -> None:
    """E209 unless the transform runs along the last storage dimension, which blocks keep whole."""
    if output.transform is not None and output.transform_dim != len(output.shape) - 1:
        raise EngineError(
            "E209",
            f"transform `{output.transform[0]}` of `{output.name}` runs along an axis that is not stored last",
            place=Place(output.place),
            got=f"axis `{output.transform[1]}` is dimension {output.transform_dim}",
            expected=f"dimension {len(output.shape) - 1}",
            fix="Write the target's axes so that the transformed axis comes last.",
        )


def elements(data: memoryview, dtype: str) -> np.ndarray:
    """Bytes as unsigned integers of the size of a safetensors type."""
    import numpy as np

    return np.frombuffer(data, np.dtype(f"u{ITEM_SIZES[dtype]}"))


_EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}


def all_finite(data: memoryview, dtype: str) -> bool:
    """Whether no number is NaN or infinite; true for types that are not checked."""
    if dtype not in _EXPONENT or not data.nbytes:
        return True
    bits = elements(data, dtype)
    return bool((bits << 1).max() < _EXPONENT[dtype] << 1)  # without the sign


class Converter:
    """Turns gathered blocks into the bytes to write; reuses its buffer. Belongs to one thread."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def convert(self, output: Output, block: memoryview) -> memoryview:
        """The block itself if nothing changes, else a buffer that is valid until the next call."""
        if output.unchanged:
            return block
        import numpy as np

        values = elements(block, output.read_dtype).view(float_type(output.read_dtype))
        target = float_type(output.dtype)
        nbytes = values.size * target.itemsize
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        data = memoryview(self._buffer)[:nbytes]
        written = np.frombuffer(data, target)
        with np.errstate(all="ignore"):  # NaN stays NaN; a number that becomes infinite is refused
            if output.transform is not None:
                rows = values.astype(np.float32)
                self._check_overflow(output, values, rows, output.read_dtype, "F32")
                operation, takes = output.transform
                values = FUNCTIONS[operation](rows.reshape(-1, output.shape[-1]), takes).reshape(-1)
            np.copyto(written, values, casting="unsafe")
            held = output.read_dtype if output.transform is None else "F32"
            self._check_overflow(output, values, written, held, output.dtype)
        return data

    @staticmethod
    def _check_overflow(output: Output, values: np.ndarray, written: np.ndarray, held: str, dtype: str) -> None:
        """E406 when numbers of type `held` became infinite as `dtype`."""
        import numpy as np

        if _RANGES.index(dtype) >= _RANGES.index(held) or all_finite(written.view(f"u{written.itemsize}").data, dtype):
            return

        lost = ~np.isfinite(written) & np.isfinite(values)
        if lost.any():
            largest = float(np.abs(values[lost].astype(np.float64)).max())
            kind, most = _LARGEST.get(dtype, (dtype, "fewer"))
            raise EngineError(
                "E406",
                f"`{output.name}` does not fit {kind}",
                place=Place(output.place),
                got=f"{int(lost.sum())} values up to {largest:g}",
                expected=f"at most {most}",
                fix="Write a type with a larger range, like --dtype bfloat16 or float32.",
            )
