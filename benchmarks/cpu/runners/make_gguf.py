"""`make_gguf.py SOURCE OUT TYPE`: a GGUF file in another type, by llama.cpp's own quantizer."""

from __future__ import annotations

import sys

import llama_cpp

TYPES = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main() -> None:
    source, out, kind = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = TYPES[kind], True, 2
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), params):
        raise SystemExit("llama_model_quantize failed")


if __name__ == "__main__":
    main()
