"""The order in which long videos come about, against lists made by FDM's rules."""

import numpy as np
import pytest

from walt_jax.errors import UserError
from walt_jax.tasks.plans import SCHEMES, Step, plan

HIERARCHIES = ("hierarchy2", "hierarchy3", "adaptive")


def apart(frames, other):
    return np.abs(np.asarray(frames) - other).astype(float)


def steps(scheme, *numbers, **options):
    return list(plan(scheme, *numbers, distance=apart, **options))


def block(start, stop):
    return tuple(range(start, stop))


def test_autoregressive_goes_on_from_the_last_frames():
    expected = [Step(block(i - 10, i), block(i, min(i + 10, 100))) for i in range(36, 100, 10)]
    assert steps("autoregressive", 100, 20, 36) == expected


def test_frame_prediction_gives_two_frames():
    expected = [Step(block(i - 2, i), block(i, min(i + 18, 100))) for i in range(36, 100, 18)]
    assert steps("frame_prediction", 100, 20, 36) == expected
    assert steps("frame_prediction", 9, 5) == [
        Step((), block(0, 5)),
        Step((3, 4), block(5, 8)),
        Step((6, 7), (8,)),
    ]


def test_long_range_keeps_the_last_observed_frames():
    expected = [Step(block(26, 36), block(36, 46))]
    expected += [
        Step((31, 32, 33, 34, 35, *block(i - 5, i)), block(i, min(i + 10, 100)))
        for i in range(46, 100, 10)
    ]
    assert steps("long_range", 100, 20, 36) == expected


def test_hierarchy_2_spreads_frames_and_fills_in():
    assert steps("hierarchy2", 100, 20, 36) == [
        Step((0, 3, 7, 11, 15, 19, 23, 27, 31, 35), (36, 43, 50, 57, 64, 71, 78, 85, 92, 99)),
        Step((32, 33, 34, 35, 36, 43, 50, 57, 64, 71), (37, 38, 39, 40, 41, 42, 44, 45, 46, 47)),
        Step((44, 45, 46, 47, 50, 57, 64, 71, 78, 85), (48, 49, 51, 52, 53, 54, 55, 56, 58, 59)),
        Step((55, 56, 57, 58, 59, 64, 71, 78, 85, 92), (60, 61, 62, 63, 65, 66, 67, 68, 69, 70)),
        Step((66, 67, 68, 69, 70, 71, 78, 85, 92, 99), (72, 73, 74, 75, 76, 77, 79, 80, 81, 82)),
        Step((76, 77, 78, 79, 80, 81, 82, 85, 92, 99), (83, 84, 86, 87, 88, 89, 90, 91, 93, 94)),
        Step((86, 87, 88, 89, 90, 91, 92, 93, 94, 99), (95, 96, 97, 98)),
    ]


def test_hierarchy_3_has_a_level_of_every_second_frame_between():
    found = steps("hierarchy3", 100, 20, 36)
    assert found[:4] == [
        Step((0, 3, 7, 11, 15, 19, 23, 27, 31, 35), (36, 43, 50, 57, 64, 71, 78, 85, 92, 99)),
        Step((33, 34, 35, 36, 43, 50, 57, 64, 71, 78), (38, 40, 42, 44, 46, 48, 51, 53, 55, 58)),
        Step((53, 55, 57, 58, 64, 71, 78, 85, 92, 99), (60, 62, 65, 67, 69, 72, 74, 76, 79, 81)),
        Step((71, 72, 74, 76, 78, 79, 81, 85, 92, 99), (83, 86, 88, 90, 93, 95, 97)),
    ]
    # Ten missing frames have more than eight others between them: fewer at a time, given more.
    assert found[4] == Step(
        (36, 38, 40, 42, 43, 44, 46, 48, 50, 51, 53, 55), (37, 39, 41, 45, 47, 49, 52, 54)
    )


def test_adaptive_generates_as_hierarchy_2_given_the_nearest_and_the_most_different():
    found, plain = steps("adaptive", 100, 20, 36), steps("hierarchy2", 100, 20, 36)
    assert [s.generate for s in found] == [s.generate for s in plain]
    assert found[0] == plain[0]
    # 43 lies between, 36 and 35 before, 50 after; then the farthest one by one: 99 and 0, 71 (21
    # away from 50, as far as 78 from 99), 17, 85 and 26.
    assert found[1].given == (0, 17, 26, 35, 36, 43, 50, 71, 85, 99)


def test_adaptive_asks_about_frames_that_are_there_when_a_step_is_asked_for():
    there = set(range(36))

    def ask(frames, other):
        assert {*frames, other} <= there
        return apart(frames, other)

    for step in plan("adaptive", 100, 20, 36, distance=ask):
        there |= set(step.generate)
    assert there == set(range(100))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "numbers",
    [
        (100, 20, 36, None),
        (129, 5, 0, None),
        (129, 5, 2, 3),
        (130, 8, 1, 4),
        (17, 8, 0, 6),
        (12, 8, 4, 4),
        (8, 8, 0, None),
        (3, 8, 0, None),
        (3, 8, 1, 4),
        (9, 4, 9, None),
        (61, 3, 0, 2),
    ],
)
def test_every_frame_comes_about_once_from_frames_that_are_there(scheme, numbers):
    count, window, observed, step = numbers
    there = set(range(observed))
    found = steps(scheme, count, window, observed, step=step)
    for s in found:
        assert s.generate and set(s.given) <= there and not set(s.generate) & there
        assert len(s.given) + len(s.generate) <= window
        assert list(s.given) == sorted(set(s.given))
        assert list(s.generate) == sorted(set(s.generate))
        there |= set(s.generate)
    assert there == set(range(count))


@pytest.mark.parametrize("scheme", HIERARCHIES)
def test_missing_frames_are_given_some_on_both_sides(scheme):
    for step in steps(scheme, 129, 8, 0)[1:]:
        assert step.given[0] < step.generate[0] and step.given[-1] > step.generate[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("spiral", 100, 20), "No scheme 'spiral'.*frame_prediction, autoregressive"),
        (("autoregressive", 100, 20, 0, 20), "from 1 to 19"),
        (("hierarchy2", 100, 20, 0, 1), "from 2 to 19"),
        (("long_range", 10, 20, 11), "11 frames are observed of a video of 10"),
        (("adaptive", 100, 20), "give a distance"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        plan(*arguments)
