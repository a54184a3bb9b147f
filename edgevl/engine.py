"""From a bundle to an answer: open, look at pictures, prefill, generate. One stream feeds chat and captions.

The engine owns one conversation (slot 0): what lies in the KV cache is remembered token by token, and a new prompt that
begins the same way costs only its new tokens. It knows nothing of terminals, files of captions or kernels.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from edgevl.bundle import Bundle
from edgevl.config import ModelConfig, TilingConfig
from edgevl.errors import BundleError, CapacityError, PromptError, UsageError
from edgevl.golden import check_golden
from edgevl.image import Picture, cut_tiles
from edgevl.layouts import relaid
from edgevl.prefill import feed
from edgevl.prompt import Message, Prompt, PromptBuilder
from edgevl.runner import F32, Limits, Runner
from edgevl.sampling import Sampler, Sampling
from edgevl.tiling import fit_tiles, image_cost
from edgevl.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Delta", "Engine", "Request", "Result", "Sampling"]

_EMBEDDING_CACHE = 64 << 20  # bytes of image embeddings kept for later questions

# What a place in the KV cache holds: a token id, or one row of one picture's embeddings.
Key = int | tuple[str, int]


@dataclass(frozen=True)
class Request:
    """One question: the whole conversation so far, oldest first, ending with the user."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 1024
    tiling: TilingConfig | None = None  # None: the model's own


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
    tokens: dict[str, int]  # prompt, image, generated, reused
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
        self._held: list[Key] = []  # what slot 0 of the KV cache holds
        self._embeddings: OrderedDict[str, F32] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None, backend: str = "auto") -> Engine:
        """Open a bundle on this machine; at the first load the golden prompt is checked.

        `backend` is "auto", "cpu", "cuda" or "reference". Raises `BundleError` for a bundle that is damaged or not for
        this machine.
        """
        start = time.perf_counter()
        bundle = Bundle.open(path)
        runner = make_runner(bundle, threads, backend)
        if bundle.fresh:
            if bundle.manifest.golden is not None:
                check_golden(runner, bundle.manifest.model, bundle.manifest.golden)
            bundle.mark_verified()
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
        prompt, pictures, tiling, notes = self._prepare(request)
        start = time.perf_counter()
        embeddings = [self._embed(picture, tiling) for picture in pictures] if tiling else []
        looked = time.perf_counter()

        keys, ids, rows = self._lay_out(prompt, pictures, embeddings, tiling)
        reused = _common(self._held, keys[:-1])
        self._held = keys[:reused]
        logits = feed(self.runner, ids[reused:], reused, rows, 1)
        self._held = list(keys)
        filled = time.perf_counter()

        sampler, decoder = Sampler(request.sampling), StreamDecoder(self.tokenizer)
        room = min(request.max_tokens, self.limits.context - len(ids) + 1)
        tokens: list[int] = []
        pieces: list[str] = []
        reason = "length"
        while True:
            token = sampler.pick(logits[0, : self.config.tokens.size])
            if token in self.config.tokens.stop:
                reason = "stop"
                break
            tokens.append(token)
            pieces.append(decoder.push(token))
            yield Delta(token, pieces[-1])
            if len(tokens) >= room:
                break
            logits = feed(self.runner, [token], len(self._held), None, 1)
            self._held.append(token)
        tail = decoder.flush()
        if tail:
            pieces.append(tail)
        image_tokens = sum(count for _, count, _ in prompt.images)
        counts = {"prompt": len(ids), "image": image_tokens, "generated": len(tokens), "reused": reused}
        seconds = {"vision": looked - start, "prefill": filled - looked, "decode": time.perf_counter() - filled}
        if reason == "length" and room < request.max_tokens:
            notes = (*notes, f"the answer was cut at the plan's {self.limits.context} tokens of context")
        yield Result("".join(pieces), tuple(tokens), reason, counts, seconds, notes)

    # -- one request --------------------------------------------------------------------------------------------

    def _prepare(self, request: Request) -> tuple[Prompt, list[Picture], TilingConfig | None, tuple[str, ...]]:
        """Cost everything from sizes alone, then build the prompt."""
        pictures = [part for m in request.messages for part in m.parts if isinstance(part, Picture)]
        notes = tuple(note for picture in pictures for note in picture.notes)
        vision, tiling = self.config.vision, request.tiling or self.config.tiling
        if pictures and (vision is None or tiling is None):
            raise PromptError("this bundle holds a language model without eyes; ask without pictures")
        context = self.limits.context
        if not pictures or vision is None or tiling is None:
            prompt = self._prompts.build(request.messages, [])
        else:
            sizes = [picture.size for picture in pictures]
            text = len(self._prompts.build(request.messages, [0] * len(sizes)).token_ids)
            wanted = tiling.max_tiles
            tiling = fit_tiles(sizes, context - text - 1, tiling, vision)
            if tiling.max_tiles < wanted:
                notes = (*notes, f"pictures were cut into at most {tiling.max_tiles} tiles to fit {context} tokens")
            costs = [image_cost(w, h, tiling, vision).tokens for w, h in sizes]
            prompt = self._prompts.build(request.messages, costs)
        if len(prompt.token_ids) >= context:
            raise CapacityError(
                f"the prompt has {len(prompt.token_ids)} tokens, this bundle holds {context} in and out together; "
                "ask a shorter question, or build with a larger --context"
            )
        return prompt, pictures, tiling, notes

    def _embed(self, picture: Picture, tiling: TilingConfig) -> F32:
        """The picture's embeddings (tokens, C), from the cache or by running the tower."""
        vision = self.config.vision
        assert vision is not None
        key = _embedding_key(picture, tiling)
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key]
        cost = image_cost(*picture.size, tiling, vision)
        tiles = cut_tiles(picture, cost.tiling, tiling, vision.tile_size)
        step = self.limits.tiles
        rows = [self.runner.vision(tiles[i : i + step]).copy() for i in range(0, len(tiles), step)]
        embeddings: F32 = np.concatenate(rows)
        self._embeddings[key] = embeddings
        while len(self._embeddings) > 1 and sum(e.nbytes for e in self._embeddings.values()) > _EMBEDDING_CACHE:
            self._embeddings.popitem(last=False)
        return embeddings

    def _lay_out(
        self, prompt: Prompt, pictures: list[Picture], embeddings: list[F32], tiling: TilingConfig | None
    ) -> tuple[list[Key], list[int], F32 | None]:
        """What each place of the sequence is (keys), the ids to feed, and all image rows one after the other."""
        ids = list(prompt.token_ids)
        keys: list[Key] = list(ids)
        offset = 0
        for start, count, index in prompt.images:
            assert tiling is not None
            name = _embedding_key(pictures[index], tiling)
            for r in range(count):
                keys[start + r] = (name, r)
                ids[start + r] = -1 - (offset + r)
            offset += count
        rows = np.concatenate([embeddings[i] for _, _, i in prompt.images]) if prompt.images else None
        return keys, ids, rows


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
        return CudaRunner(manifest.model, manifest.limits, bundle.weight, device, cubins)
    if backend == "cuda":
        raise BundleError(f"the bundle was built for {target.name} and has no GPU kernels; see `edgevl targets`")
    from edgevl.backends.cpu import CpuRunner

    weights = bundle.weight if target.backend == "cpu" else cache(lambda name: relaid(bundle.weight(name), "panels"))
    return CpuRunner(manifest.model, manifest.limits, weights, threads)


def _embedding_key(picture: Picture, tiling: TilingConfig) -> str:
    return f"{picture.digest}:{tiling.rule}:{tiling.max_tiles}:{tiling.thumbnail}"


def _common(held: list[Key], wanted: list[Key]) -> int:
    """How many leading places are the same."""
    count = 0
    for a, b in zip(held, wanted):  # noqa: B905 (the shorter one ends it)
        if a != b:
            break
        count += 1
    return count


def with_max_tiles(tiling: TilingConfig, max_tiles: int | None, rule: str | None) -> TilingConfig:
    """The model's tiling with the user's switches."""
    changed = replace(tiling, max_tiles=max_tiles) if max_tiles is not None else tiling
    return replace(changed, rule=rule) if rule is not None else changed
