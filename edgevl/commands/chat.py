"""`edgevl chat`: one question with `-p`, or a conversation; the answer streams to stdout.

Knows the options; conversations at a terminal are `edgevl.dialogue`'s.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgevl.console import note, print_json
from edgevl.errors import UsageError
from edgevl.quantities import duration
from edgevl.terminal import at_terminal, check_text, show_text, waiting

_STDIN_LIMIT = 4 << 20  # bytes of a prompt that is read from stdin; no context holds more


@click.command(name="chat", short_help="Talk to a bundle about text and pictures.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-i", "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; up to 4 times."
)
@click.option("--video", type=click.Path(path_type=Path), help="A video; its frames are spread over the clip.")
@click.option("--frames", type=int, help="Frames of a video; default: what the context has room for, 8 to 32.")
@click.option("-p", "--prompt", help='The question; "-" reads it from stdin. Without it, a conversation.')
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from this share of probability.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="Longest answer.")
@click.option(
    "--schema",
    type=click.Path(path_type=Path),
    help="Hold answers to the JSON schema in this file; objects get the properties it names and no others.",
)
@click.option("--max-tiles", type=int, help="Most tiles of a picture; default: the model's own.")
@click.option("--first-token", type=duration, help="Fewer tiles, so that the first token comes in this time: 1s.")
@click.option("--tiling", type=click.Choice(["hf", "native"]), help="How pictures are cut; default: the model's own.")
@click.option("--embeddings", type=click.Path(path_type=Path), help="Keep embeddings in this folder, for later runs.")
@click.option("--threads", type=int, help="Default: every core.")
@click.option("--backend", type=click.Choice(["auto", "cpu", "cuda", "reference"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print each answer as a JSON document on a line.")
def command(
    bundle: Path,
    images: tuple[Path, ...],
    video: Path | None,
    frames: int | None,
    prompt: str | None,
    system: str | None,
    temperature: float,
    top_p: float,
    seed: int,
    max_tokens: int,
    schema: Path | None,
    max_tiles: int | None,
    first_token: float | None,
    tiling: str | None,
    embeddings: Path | None,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Ask BUNDLE about pictures, a video and text.

    Pictures come before the prompt, in the order given, then the video. Without -p a conversation starts; /help
    lists its commands.
    """
    from edgevl.conversation import AnswerSettings, Conversation
    from edgevl.dialogue import Dialogue, answer_to, document, load_picture, open_video, tell
    from edgevl.engine import Engine, Sampling, with_max_tiles
    from edgevl.pace import measure_pace
    from edgevl.prompt import MAX_IMAGES
    from edgevl.schema import Schema, read_schema
    from edgevl.video import check_file

    if as_json and prompt is None and at_terminal():
        raise UsageError("--json is for one question, with -p, or for questions through a pipe; add -p")
    if len(images) > MAX_IMAGES:
        raise UsageError(f"{len(images)} pictures were given; the model takes at most {MAX_IMAGES}")
    if frames is not None and video is None and prompt is not None:
        raise UsageError("--frames is for a video; add --video with one")
    if frames is not None and frames < 1:
        raise UsageError(f"--frames is {frames}; it must be at least 1")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens is {max_tokens}; it must be at least 1")
    if first_token is not None and first_token <= 0:
        raise UsageError(f"--first-token is {first_token:g} s; it must be more than 0")
    sampling = Sampling(temperature, top_p, seed)
    text = None if prompt is None else _read_prompt(prompt)
    check_text("--system", system or "")
    rules = None if schema is None else read_schema(schema)
    pictures = [load_picture(path, "--video") for path in images]
    if video is not None:
        check_file(video)

    with waiting("loading the model"):
        engine = Engine.open(bundle, threads, backend)
    own = engine.config.tiling
    if own is None and (max_tiles is not None or tiling is not None or first_token is not None):
        raise UsageError(
            "this bundle holds a language model without eyes; leave out --max-tiles, --tiling and --first-token"
        )
    cut = None if own is None else with_max_tiles(own, max_tiles, tiling)
    held = None if rules is None else Schema(rules, engine.bundle.tokenizer_json(), engine.config.tokens)
    pace = None if first_token is None else measure_pace(engine.runner, engine.config, first_token)
    conversation = Conversation(engine, AnswerSettings(system, sampling, max_tokens, cut, pace, held), note)
    if embeddings is not None:
        engine.embeddings.keep_on_disk(embeddings, engine.bundle.digest)
    for picture in pictures:
        conversation.attach(picture)
    if video is not None:
        conversation.attach(open_video(engine, conversation, video, frames))
    if text is None:
        Dialogue(engine, conversation, frames, as_json).run()
    elif as_json:
        print_json(document(engine, answer_to(conversation, text, lambda _: None)))
    else:
        tell(answer_to(conversation, text, show_text), set())


def _read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for "-"."""
    if prompt != "-":
        check_text("--prompt", prompt)
        return prompt
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(_STDIN_LIMIT + 1)
    if len(data) > _STDIN_LIMIT:
        raise UsageError(f"stdin has more than {_STDIN_LIMIT} bytes; no context holds such a prompt, so shorten it")
    text = data.decode("utf-8", "surrogateescape")
    check_text("stdin", text)
    return text
