"""gm-tiny's scenes, patch labels and questions, these checked against an independent reading."""

from __future__ import annotations

import importlib
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gm_tiny_reading import COLOURS, SHAPES, derive, with_article

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "train_gm_tiny"))

scenes: Any = importlib.import_module("scenes")
questions: Any = importlib.import_module("questions")
phrasings: Any = importlib.import_module("phrasings")


def drawn(count: int, split: str = "test") -> list[Any]:
    return [scenes.sample_scene(scenes.scene_rng(split, 0, i)) for i in range(count)]


@pytest.fixture(scope="module")
def sample() -> list[Any]:
    return drawn(600)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Any, str, str, str]]:
    """Some 6,000 questions as `(scene, question, answer, kind)`."""
    found = []
    for index, scene in enumerate(drawn(600, "asked")):
        rng = random.Random(index)
        found += [(scene, *question) for question in questions.questions_for(scene, rng, 10)]
    return found


# --- scenes ---


def test_a_seed_gives_the_same_scene_and_pixels() -> None:
    first, second, other = (scenes.sample_scene(scenes.scene_rng("train", seed, 7)) for seed in (0, 0, 1))
    assert first == second
    assert first != other
    assert np.array_equal(scenes.render(first), scenes.render(second))
    assert scenes.scene_rng("train", 0, 7).random() != scenes.scene_rng("heldout", 0, 7).random()


def test_the_scenes_cover_what_they_should(sample: list[Any]) -> None:
    counts = [len(scene.objects) for scene in sample]
    assert set(counts) == {0, 1, 2, 3, 4}
    assert 0.3 < counts.count(1) / len(counts) < 0.55
    assert {(o.shape, o.colour) for scene in sample for o in scene.objects} == {(s, c) for s in SHAPES for c in COLOURS}


def test_objects_keep_apart_and_inside(sample: list[Any]) -> None:
    for scene in sample:
        for number, item in enumerate(scene.objects):
            left, top, right, bottom = item.box()
            assert min(left, top) >= -1e-9
            assert max(right, bottom) <= 64 + 1e-9
            for other in scene.objects[:number]:
                assert np.hypot(item.x - other.x, item.y - other.y) >= 14
                assert (item.x // 8, item.y // 8) != (other.x // 8, other.y // 8)


def test_pixels_show_each_object_and_the_background(sample: list[Any]) -> None:
    for scene in sample[:200]:
        pixels = scenes.render(scene)
        assert pixels.shape == (64, 64, 3)
        assert pixels.dtype == np.uint8
        for item in scene.objects:
            x, y = int(item.x), int(item.y)
            seen = pixels[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(axis=0)
            assert np.abs(seen - item.rgb).max() < 20
            assert np.abs(np.array(item.rgb) - scenes.COLOURS[item.colour]).max() <= 28
        if not scene.noise:
            clear = ~covered(scene, margin=2)
            assert (pixels[clear] == scene.background).all()


def covered(scene: Any, margin: float) -> np.ndarray:
    """bool [64, 64]: the pixels within ``margin`` of an object's bounding box."""
    y, x = np.mgrid[:64, :64] + 0.5
    found = np.zeros((64, 64), bool)
    for left, top, right, bottom in (item.box() for item in scene.objects):
        found |= (x > left - margin) & (x < right + margin) & (y > top - margin) & (y < bottom + margin)
    return found


# --- patch labels ---


def test_patch_labels_agree_with_the_pixels(sample: list[Any]) -> None:
    clean = [scene for scene in sample if not scene.noise and scene.objects][:150]
    for scene in clean:
        labels = scenes.patch_labels(scene)
        image = scenes.render(scene).astype(int).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 64, 3)
        for patch in range(64):
            shape, colour = labels["cover_shape"][patch], labels["cover_colour"][patch]
            assert bool(shape) == bool(colour)
            # Share of the patch whose pixels are exactly an object's colour; its blurred edge is not counted.
            share = {o: (image[patch] == o.rgb).all(-1).mean() for o in scene.objects}
            most = max(share, key=lambda o: share[o])
            if shape:
                named = [o for o in scene.objects if (o.shape, o.colour) == (SHAPES[shape - 1], COLOURS[colour - 1])]
                assert max(share[o] for o in named) >= share[most] - 0.15
            else:
                assert share[most] <= 0.2 + 1e-9


def test_centre_labels_mark_each_object_once(sample: list[Any]) -> None:
    for scene in sample[:200]:
        labels = scenes.patch_labels(scene)
        assert tuple(labels) == scenes.LABELS
        for item in scene.objects:
            patch = int(item.y) // 8 * 8 + int(item.x) // 8
            assert labels["centre_shape"][patch] == 1 + SHAPES.index(item.shape)
            assert labels["centre_colour"][patch] == 1 + COLOURS.index(item.colour)
        assert np.count_nonzero(labels["centre_shape"]) == len(scene.objects)


def test_covered_patches_say_where_their_object_is(sample: list[Any]) -> None:
    for scene in sample[:200]:
        labels = scenes.patch_labels(scene)
        places = {(1 + int(o.y) // 8, 1 + int(o.x) // 8): (o.shape, o.colour) for o in scene.objects}
        for patch in np.flatnonzero(labels["cover_shape"]):
            shape, colour = places[labels["cover_row"][patch], labels["cover_column"][patch]]
            assert labels["cover_shape"][patch] == 1 + SHAPES.index(shape)
            assert labels["cover_colour"][patch] == 1 + COLOURS.index(colour)
        nothing = labels["cover_shape"] == 0
        assert not labels["cover_row"][nothing].any() and not labels["cover_column"][nothing].any()


# --- questions ---


def test_every_answer_can_be_derived_from_the_scene(asked: list[tuple[Any, str, str, str]]) -> None:
    wrong = [(q, answer, derive(scene, q)) for scene, q, answer, _ in asked if derive(scene, q) != answer]
    assert wrong == []
    assert len(asked) > 5500


def test_the_check_notices_wrong_and_ambiguous_questions() -> None:
    def item(colour: str, shape: str, x: float, y: float) -> Any:
        return scenes.Object(shape, colour, x, y, 10.0, 10.0, (0, 0, 0))

    scene = scenes.Scene((255, 255, 255), (item("red", "star", 10, 10), item("red", "circle", 30, 22)))
    assert derive(scene, "is the star to the left of the circle?") == "yes"
    assert derive(scene, "how many red shapes are there?") == "2"
    for ambiguous in ("what shape is red?", "where is the circle?", "what shape is it?", "describe the image."):
        with pytest.raises(AssertionError, match="ambiguous"):
            derive(scene, ambiguous)


def test_every_kind_and_phrasing_is_asked(asked: list[tuple[Any, str, str, str]]) -> None:
    assert {kind for *_, kind in asked} == set(phrasings.TRAINING_MIX)
    texts = {question for _, question, _, _ in asked}
    for form, wordings in phrasings.PHRASINGS.items():
        for wording in wordings:
            pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(wording))
            assert any(re.fullmatch(pattern, text) for text in texts), (form, wording)


def test_yes_and_no_are_balanced_in_each_kind(asked: list[tuple[Any, str, str, str]]) -> None:
    for kind in ("present", "absent", "relation"):
        answers = [answer for _, _, answer, k in asked if k == kind]
        assert set(answers) == {"yes", "no"}
        assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_questions_of_a_scene_differ_and_follow_the_mix() -> None:
    scene = drawn(1)[0]
    mine = questions.questions_for(scene, random.Random(0), 12)
    assert len({question for question, _, _ in mine}) == len(mine)
    assert mine == questions.questions_for(scene, random.Random(0), 12)
    counts = questions.questions_for(scene, random.Random(0), 3, {"count": 1.0})
    assert [kind for *_, kind in counts] == ["count"] * 3


def test_captions_name_every_object(sample: list[Any]) -> None:
    for scene in sample[:200]:
        text = questions.caption(scene)
        assert [text.count(with_article(o)) >= 1 for o in scene.objects] == [True] * len(scene.objects)
        assert (text == "nothing") == (not scene.objects)


def test_typed_questions_change_only_case_and_end() -> None:
    rng = random.Random(0)
    typed = [questions.as_typed("what shape is it?", rng) for _ in range(1000)]
    assert set(typed) == {"what shape is it?", "What shape is it?", "what shape is it", "What shape is it"}
    assert 0.8 < typed.count("what shape is it?") / 1000 < 0.9


def test_the_held_out_set_keeps_its_promises() -> None:
    held_out = questions.heldout(1000, seed=0)
    kinds = [kind for *_, kind in held_out]
    share = {kind: kinds.count(kind) / 1000 for kind in phrasings.TRAINING_MIX}
    assert len(held_out) == 1000
    assert share["count"] >= 0.15
    assert share["where"] + share["at"] + share["relation"] + share["next"] >= 0.25
    assert 0.02 <= share["describe"] <= 0.05
    by_scene: dict[Any, int] = {}
    for scene, question, answer, _ in held_out:
        by_scene[scene] = by_scene.get(scene, 0) + 1
        assert derive(scene, question) == answer
    assert max(by_scene.values()) <= 2
    assert not by_scene.keys() & set(drawn(2000, "train"))
    assert held_out[:20] == questions.heldout(1000, seed=0)[:20]
    assert held_out[:20] != questions.heldout(1000, seed=1)[:20]
    assert len(questions.heldout(33, seed=0)) == 33
