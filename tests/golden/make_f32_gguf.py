#!/usr/bin/env python3
"""Dequantizes every tensor of a GGUF file to F32 and writes the result as a GGUF of its own.

An independent engine compared with vqkv has to start from the same numbers: llama.cpp multiplies quantized weights with
quantized activations, so a Q4 file would differ from any fp32 reference by far more than a rounding error.

    python3 tests/golden/make_f32_gguf.py [SOURCE.gguf [OUTPUT.gguf]]

Defaults: data/models/SmolLM2-135M-Instruct.Q4_1.gguf -> data/models/SmolLM2-135M-Instruct.F32.gguf (not in git).
Needs the packages gguf and numpy.
"""
import pathlib
import sys

import gguf
import numpy as np

models = pathlib.Path(__file__).resolve().parents[2] / "data" / "models"


def convert(source: pathlib.Path, output: pathlib.Path) -> None:
    reader = gguf.GGUFReader(str(source))
    architecture = reader.get_field("general.architecture").contents()
    partial = output.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        value_type = field.types[0]
        sub_type = field.types[1] if value_type == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), value_type, sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, data)  # numpy order: the fastest axis last, as GGUFWriter expects
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(output)


if __name__ == "__main__":
    src = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else models / "SmolLM2-135M-Instruct.Q4_1.gguf"
    dst = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else models / "SmolLM2-135M-Instruct.F32.gguf"
    convert(src, dst)
    print(f"{dst} {dst.stat().st_size} bytes")
