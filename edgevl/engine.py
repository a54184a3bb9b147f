"""From a bundle to an answer: open, look at pictures, prefill, generate. One stream feeds chat and captions.

The engine owns one conversation (slot 0): what lies in the KV cache is remembered token by token, and a new prompt that
begins the same way costs only its new tokens. It knows nothing of terminals, files of captions or kernels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from edgevl.budget import Budget
from edgevl.bundle import Bundle
from edgevl.config import ModelConfig, TilingConfig
from edgevl.embeddings import Embeddings
from edgevl.errors import BundleError, UsageError
from edgevl.generation import Generation, Key
from edgevl.golden import check_golden
from edgevl.layouts import relaid
from edgevl.lookup import Lookup
from edgevl.prefill import feed
from edgevl.prompt import Message, Prompt, PromptBuilder
from edgevl.runner import F32, Limits, Runner
from edgevl.sampling import Sampler, Sampling
from edgevl.schema import Schema
from edgevl.tokenizer import StreamDecoder, Tokenizer
from edgevl.view import View

__all__ = ["Delta", "Engine", "Request", "Result", "Sampling"]


@dataclass(frozen=True)
class Request:
    """One question: the whole conversation so far, oldest first, ending with the user."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1024
    tiling: TilingConfig | None = None  # None: the model's own
    schema: Schema | None = None  # what the answer is held to
    lookup: bool = True  # guess tokens from the prompt; the answer is the same, and sooner there where it copies


@dataclass(frozen=True)
class Delta:
    """One more token; `text` may be empty while a character is incomplete."""

    token_id: int
    text: str


@dataclass(frozen=True)
class Result:
    """The finished answer, last item of the stream."""

    text: str
    token_ids: tuple[int, ...]  # without the stop token
    finish_reason: str  # "stop" | "length"
    tokens: dict[str, int]  # prompt, image, generated, reused, steps of decoding
    seconds: dict[str, float]  # vision, prefill, decode
    notes: tuple[str, ...] = ()


class Engine:
    """A loaded bundle."""

    def __init__(self, bundle: Bundle, runner: Runner, load_seconds: float = 0.0) -> None:
        self.bundle, self.runner, self.load_seconds = bundle, runner, load_seconds
        self.config: ModelConfig = bundle.manifest.model
        self.limits: Limits = runner.limits
        self.tokenizer = Tokenizer(bundle.tokenizer_json())
        self._prompts = PromptBuilder(self.tokenizer, bundle.chat_template(), self.config.tokens)
        self.budget = Budget(self._prompts, self.tokenizer, self.config, self.limits.context)
        self.embeddings = Embeddings(self.config.text.hidden_size)
        self._held: list[Key] = []  # what slot 0 of the KV cache holds

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None, backend: str = "auto") -> Engine:
        """Open a bundle on this machine; at the first load the golden prompt is checked.

        `backend` is "auto", "cpu", "cuda" or "reference". Raises `BundleError` for a bundle that is damaged or not for
        this machine.
        """
        start = time.perf_counter()
        bundle = Bundle.open(path)
        runner = make_runner(bundle, threads, backend)
        if bundle.needs_golden(runner.backend):
            if bundle.manifest.golden is not None:
                check_golden(runner, bundle.manifest.model, bundle.manifest.golden)
            bundle.mark_verified(runner.backend)
        return cls(bundle, runner, time.perf_counter() - start)

    @property
    def planned_bytes(self) -> int:
        """Weights and everything the plan allocates."""
        return self.runner.planned_bytes

    def reset(self) -> None:
        """Forget the conversation; picture embeddings stay."""
        self._held = []

    def stream(self, request: Request) -> Iterator[Delta | Result]:
        """Answer: a `Delta` for each token, then one `Result`. Closing the iterator early keeps what was said so far.

        Raises `PromptError`, `ImageError` or `CapacityError` before any token is computed.
        """
        if request.max_tokens < 1:
            raise UsageError(f"max tokens is {request.max_tokens}; it must be at least 1")
        prompt, views, notes = self._prepare(request)
        room = min(request.max_tokens, self.limits.context - len(prompt.token_ids) + 1)
        sampler = Sampler(request.sampling)
        chooser = sampler if request.schema is None else request.schema.chooser(sampler, room)
        start = time.perf_counter()
        keys = _keys(prompt, views)
        reused = _common(self._held, keys[:-1])
        ids, new = _lay_out(prompt, reused)
        counts = {index: count for _, count, index in prompt.images}
        rows = np.concatenate([self._embed(views[index], counts[index]) for index in new]) if new else None
        looked = time.perf_counter()

        self._held = keys[:reused]
        logits = feed(self.runner, ids[reused:], reused, rows, 1)
        self._held = list(keys)
        filled = time.perf_counter()

        decoder = StreamDecoder(self.tokenizer)
        tokens: list[int] = []
        pieces: list[str] = []
        lookup = Lookup(ids) if request.lookup else None
        answer = Generation(self.runner, chooser, self.config.tokens, lookup)
        for token in answer.run(logits, self._held, room):
            tokens.append(token)
            pieces.append(decoder.push(token))
            yield Delta(token, pieces[-1])
        reason = "stop" if answer.stopped else "length"
        tail = decoder.flush()
        if tail:
            pieces.append(tail)
        image_tokens = sum(count for _, count, _ in prompt.images)
        spent = {"prompt": len(ids), "image": image_tokens, "generated": len(tokens), "reused": reused}
        spent["steps"] = answer.steps
        seconds = {"vision": looked - start, "prefill": filled - looked, "decode": time.perf_counter() - filled}
        if reason == "length" and room < request.max_tokens:
            notes = (*notes, f"the answer was cut at the plan's {self.limits.context} tokens of context")
        notes = (*notes, *self.embeddings.troubles())
        yield Result("".join(pieces), tuple(tokens), reason, spent, seconds, notes)

    # -- one request --------------------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> tuple[Prompt, list[View], tuple[str, ...]]:
        """Cost everything from sizes alone, then build the prompt."""
        settled = self.budget.settle(request.messages, request.tiling, request.max_tokens)
        views = [view for message in settled.messages for view in message.shown if isinstance(view, View)]
        prompt = self._prompts.build(settled.messages, self.budget.rows(settled.messages))
        return prompt, views, settled.notes

    def _embed(self, view: View, count: int) -> F32:
        """The view's embeddings (count, C), kept from before or by running the tower."""
        vision = self.config.vision
        assert vision is not None
        kept = self.embeddings.get(view.key, count)
        if kept is not None:
            return kept
        tiles, step = view.cut(vision), self.limits.tiles
        rows = [self.runner.vision(tiles[i : i + step]).copy() for i in range(0, len(tiles), step)]
        return self.embeddings.keep(view.key, np.concatenate(rows))


def _keys(prompt: Prompt, views: list[View]) -> list[Key]:
    """What each place of the sequence is."""
    keys: list[Key] = list(prompt.token_ids)
    for start, count, index in prompt.images:
        keys[start : start + count] = [(views[index].key, r) for r in range(count)]
    return keys


def _lay_out(prompt: Prompt, reused: int) -> tuple[list[int], list[int]]:
    """The ids to feed, image rows below zero, and the pictures whose rows these are, one after the other.

    A picture that lies in the first `reused` places as a whole is not looked at again; its ids are never fed.
    """
    ids, new, offset = list(prompt.token_ids), list[int](), 0
    for start, count, index in prompt.images:
        if start + count <= reused:
            ids[start : start + count] = [-1] * count
            continue
        ids[start : start + count] = range(-1 - offset, -1 - offset - count, -1)
        new.append(index)
        offset += count
    return ids, new


def make_runner(bundle: Bundle, threads: int | None, backend: str) -> Runner:
    """The backend that runs this bundle here; `BundleError` when there is none.

    A GPU's bundle also runs on the reference and, its weights laid out again in memory, on the CPU.
    """
    manifest = bundle.manifest
    target = manifest.target
    if (target.backend, target.layout) not in (("cpu", "panels"), ("cuda", "tiles")):
        raise BundleError(
            f"the bundle was built for {target.name} ({target.backend}, layout {target.layout}), which this version "
            "cannot run here; build it with --target host"
        )
    if backend == "reference":
        from edgevl.backends.reference import ReferenceRunner

        return ReferenceRunner(manifest.model, manifest.limits, bundle.weight)
    if backend not in ("auto", "cpu", "cuda"):
        raise UsageError(f"the backend {backend!r} does not exist; choose auto, cpu, cuda or reference")
    if target.backend == "cuda" and backend != "cpu":
        from edgevl.backends.cuda import CudaRunner
        from edgevl.backends.cuda_device import CudaDevice
        from edgevl.backends.cuda_program import Cubins

        cubins = Cubins(manifest.kernels, bundle.kernel_file)
        device = CudaDevice(f"the bundle was built for {target.name} ({target.architecture})", target.architecture)
        runner = CudaRunner(manifest.model, manifest.limits, bundle.weight, device, cubins)
        bundle.release()
        return runner
    if backend == "cuda":
        raise BundleError(f"the bundle was built for {target.name} and has no GPU kernels; see `edgevl targets`")
    from edgevl.backends.cpu import CpuRunner

    weights = bundle.weight if target.backend == "cpu" else cache(lambda name: relaid(bundle.weight(name), "panels"))
    return CpuRunner(manifest.model, manifest.limits, weights, threads)


def _common(held: list[Key], wanted: list[Key]) -> int:
    """How many leading places are the same."""
    count = 0
    for a, b in zip(held, wanted):  # noqa: B905 (the shorter one ends it)
        if a != b:
            break
        count += 1
    return count


def with_max_tiles(tiling: TilingConfig, max_tiles: int | None, rule: str | None) -> TilingConfig:
    """The model's tiling with the user's switches. Raises `UsageError` for less than one tile."""
    if max_tiles is not None and max_tiles < 1:
        raise UsageError(f"--max-tiles is {max_tiles}; it must be at least 1")
    changed = replace(tiling, max_tiles=max_tiles) if max_tiles is not None else tiling
    return replace(changed, rule=rule) if rule is not None else changed
