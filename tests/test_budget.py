"""What a request costs and how its pictures are cut: arithmetic on sizes, no pixel touched and no model run."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from checkpoints import tiny_vl
from deploy.build import BuildSettings, build
from edgevl.budget import Budget
from edgevl.bundle import Bundle
from edgevl.config import TilingConfig
from edgevl.errors import CapacityError, PromptError
from edgevl.image import Picture
from edgevl.pace import Pace, measure_pace
from edgevl.prompt import Message, PromptBuilder, Said
from edgevl.runner import I32
from edgevl.tokenizer import Tokenizer
from edgevl.view import PictureView, VideoView, make_video

TILE = 4  # tokens of a tile of the tiny model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("budget")
    tiny_vl(root / "m")
    build(str(root / "m"), root / "b", BuildSettings(context=384))
    return Bundle.open(root / "b")


@pytest.fixture
def budget(bundle: Bundle) -> Budget:
    tokenizer, config = Tokenizer(bundle.tokenizer_json()), bundle.manifest.model
    return Budget(PromptBuilder(tokenizer, bundle.chat_template(), config.tokens), tokenizer, config, 384)


class Untouched(Image.Image):
    """Has a size and no pixels: whoever touches them fails."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._size = (width, height)


def picture(width: int = 400, height: int = 300, digest: str = "x") -> Picture:
    return Picture(Untouched(width, height), (), digest)


def video(frames: int):  # type: ignore[no-untyped-def]
    return make_video(np.zeros((frames, 64, 64, 3), np.uint8), "clip.mp4", 1.0, ())


def cuts(budget: Budget, *parts: object, max_tokens: int = 1, **more: object) -> list[int]:
    """Most tiles of each picture and frames of each video, once settled; the prompt is checked to fit."""
    settled = budget.settle([Message("user", parts)], TilingConfig(), max_tokens, **more)  # type: ignore[arg-type]
    assert settled.tokens == budget.tokens(settled.messages) < budget.context
    views = [view for message in settled.messages for view in message.shown]
    return [
        v.tiling.max_tiles if isinstance(v, PictureView) else v.count
        for v in views
        if isinstance(v, PictureView | VideoView)
    ]


def test_several_pictures_share_the_budget_in_the_steps_of_the_training(budget: Budget) -> None:
    steps = []
    for words in range(0, 350, 5):
        steps.append(cuts(budget, *[picture()] * 4, "a " * words))
        assert len(set(steps[-1])) == 1
        if steps[-1] == [1, 1, 1, 1]:
            break
    taken = [step[0] for step in steps]
    assert taken == sorted(taken, reverse=True)
    assert set(taken) <= {12, 8, 6, 4, 2, 1} and len(set(taken)) >= 5


def test_room_for_the_answer_is_kept_while_it_can_be(budget: Budget) -> None:
    assert budget.room(1024) == 384 // 4
    assert budget.room(10) == 10
    (fine,) = cuts(budget, picture(), "a " * 230)
    (coarse,) = cuts(budget, picture(), "a " * 230, max_tokens=1024)
    assert coarse < fine
    assert cuts(budget, picture(), "a " * 340, max_tokens=1024) == [1]  # no room is left, but an answer can begin


def test_frames_and_tiles_shrink_together(budget: Budget) -> None:
    assert cuts(budget, video(20), "a") == [20]
    assert cuts(budget, video(20), "a " * 320) == [
        (384 - 1 - budget.tokens([Message("user", ("a " * 320,))]) - 3) // TILE
    ]
    before = (13, 20)
    for words in range(0, 320, 20):
        tiles, frames = cuts(budget, picture(), video(40), "a " * words)
        assert tiles <= before[0] and frames >= (40 * tiles // 12 if tiles > 1 else 1)
        before = (tiles, frames)
    assert before[0] < 12


def test_what_was_cut_before_stays(budget: Budget) -> None:
    old = PictureView(picture(), TilingConfig(2))
    messages = [Message("user", (old, "a")), Message("assistant", ("b",)), Message("user", (picture(), "a " * 250))]
    settled = budget.settle(messages, None, 1)
    first, second = (view for message in settled.messages for view in message.shown)
    assert first is old
    assert isinstance(second, PictureView) and second.tiling.max_tiles < 12
    assert budget.settle(settled.messages, None, 1).messages == settled.messages


def test_a_refusal_names_the_tokens_of_each_part(budget: Budget) -> None:
    messages = [Message("system", ("Be brief.",)), Message("user", (picture(), video(9), "word " * 300))]
    with pytest.raises(CapacityError) as refused:
        budget.settle(messages, None, 100)
    sentence = str(refused.value)
    for words in ("questions", "pictures 4", "video 4", "system", "template", "384", "--context 960"):
        assert words in sentence
    with pytest.raises(CapacityError, match=r"shorten the text; the model ends at 1024"):
        budget.settle([Message("user", ("word " * 500,))], None, 1)


def test_frames_of_another_models_tiles_are_refused(budget: Budget) -> None:
    other = VideoView(make_video(np.zeros((2, 32, 32, 3), np.uint8), "clip.mp4", 1.0, ()), 2)
    with pytest.raises(PromptError, match=r"clip.mp4 have 32 pixels a side, this model's tiles 64"):
        budget.tokens([Message("user", (other,))])


def test_parts_add_up(budget: Budget) -> None:
    messages = [
        Message("system", ("Be brief.",)),
        Message("user", (PictureView(picture(), TilingConfig(1)), VideoView(video(5), 3), "What?")),
    ]
    parts = budget.parts(messages)
    assert sum(parts.values()) == budget.tokens(messages)
    assert (parts["pictures"], parts["video"]) == (TILE, 3 * TILE)
    answered = budget.parts([*messages, Message("assistant", (Said("x", (1, 2, 3)),))])
    assert answered == {**parts, "answers": 3}
    assert budget.parts([*messages, Message("assistant", ("A b",))])["template"] == parts["template"]
    assert sum(budget.parts([]).values()) == 0


def test_a_first_token_in_time_takes_fewer_tiles_and_says_so(budget: Budget) -> None:
    text = budget.tokens([Message("user", ("a",))])
    for tiles in (1, 3, 9):
        pace = Pace(first_token=(text + 10) * 0.01 + tiles * (1 + TILE * 0.01), tile_seconds=1.0, token_seconds=0.01)
        settled = budget.settle([Message("user", (picture(), video(40), "a"))], None, 1, pace)
        views = [view for view in settled.messages[0].shown if isinstance(view, PictureView | VideoView)]
        used = sum(view.tiles(budget._config.vision) for view in views)  # type: ignore[arg-type]
        assert used == max(tiles, 2)  # one tile and one frame at least
        assert any("first token is expected after" in note for note in settled.notes)
        assert any("fewer is not possible" in note for note in settled.notes) == (tiles < 2)
    slow = Pace(0.1, 1.0, 0.01)
    assert slow.tiles(100, TILE) == 0
    assert slow.seconds(100, 2, TILE) == pytest.approx(3.08)


def test_a_pace_is_measured_by_running_both_parts(bundle: Bundle) -> None:
    ran = {"tiles": 0, "tokens": 0}

    class Played:
        limits = bundle.manifest.limits

        def vision(self, pixels: np.ndarray) -> None:  # type: ignore[type-arg]
            ran["tiles"] += len(pixels)

        def decode(self, tokens: I32, *_: object) -> None:
            ran["tokens"] += tokens.size

    pace = measure_pace(Played(), bundle.manifest.model, 1.0)  # type: ignore[arg-type]
    assert ran == {"tiles": 2, "tokens": 2 * 128}
    assert pace.tile_seconds > 0 and pace.token_seconds > 0
