"""llama.cpp through the C functions that llama-cpp-python binds."""

from __future__ import annotations

import ctypes
import time

import llama_cpp
from runner import measure, read_job, report


class LlamaCpp:
    """A model and a context."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 2048, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)

    def prefill(self, ids: list[int]) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self._run(ids)

    def decode(self, ids: list[int]) -> None:
        for token in ids:
            self._run([token])

    def _run(self, ids: list[int]) -> None:
        """The logits of the last token, positions going on from what is in the cache."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)


def main() -> None:
    job = read_job()
    began = time.perf_counter()
    longest = max([*job.prefill, *(depth + job.generate + 8 for depth in job.depths)])
    model = LlamaCpp(job.model, job.threads, (longest + 255) // 256 * 256)
    loaded = time.perf_counter() - began
    model.prefill(job.tokens[:1])
    first = time.perf_counter() - began
    measured = measure(job, model) | {"load_seconds": loaded, "first_token_seconds": first}
    report(job, measured, "llama-cpp-python")


if __name__ == "__main__":
    main()
