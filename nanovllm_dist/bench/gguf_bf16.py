"""Rewrites a quantised GGUF file with bfloat16 matrices, for a rival that must run the weights that we run.

    python -m nanovllm_dist.bench.gguf_bf16 SOURCE.gguf TARGET.gguf

Matrices are rounded as `gguf_convert` rounds them; vectors and metadata are kept. It knows no model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nanovllm_dist.errors import ConfigError, NanoVLLMError


def rewrite(source: Path, target: Path) -> None:
    """Write `target`. Raises ConfigError: the `gguf` package is missing, or `source` is not a GGUF file."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("rewriting a GGUF file takes the `gguf` package: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read as GGUF: {error}") from None
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            _copy_field(writer, name, field)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: Any, name: str, field: Any) -> None:
    kind = field.types[0]
    element = field.types[-1] if len(field.types) > 1 else None
    writer.add_key_value(name, field.contents(), kind, sub_type=element)


def main() -> int:
    """Process entry point."""
    try:
        source, target = map(Path, sys.argv[1:])
        rewrite(source, target)
    except (NanoVLLMError, ValueError) as error:
        sys.stderr.write(f"error: {error}; usage: gguf_bf16 SOURCE.gguf TARGET.gguf\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
