"""Where features go: tags in any order, repeated, absent; image token ids in order; every mismatch."""

import numpy as np
import pytest
import torch

from vision.placement import place_features

IMAGE_TOKEN = 1044


def placed(rows: list[list[int]], num_tokens: list[int], num_images: list[int] | None = None) -> list[list[int | None]]:
    """Index of the feature at each position, None where a token stands."""
    input_ids = torch.tensor(rows)
    placement = place_features(input_ids, num_tokens, IMAGE_TOKEN, num_images)
    result: list[list[int | None]] = [[None] * input_ids.shape[1] for _ in rows]
    for row, column, feature in zip(placement.rows, placement.columns, placement.feature_indices, strict=True):
        result[row][column] = int(feature)
    return result


def test_features_follow_their_tag_in_any_order():
    assert placed([[5, -1, -1, 6, -2, -2, -2]], [2, 3]) == [[None, 0, 1, None, 2, 3, 4]]
    assert placed([[5, -2, -2, -2, 6, -1, -1]], [2, 3]) == [[None, 2, 3, 4, None, 0, 1]]
    assert placed([[-2, -2, -2, -1, -1]], [2, 3]) == [[2, 3, 4, 0, 1]]


def test_a_repeated_tag_gets_its_features_again():
    assert placed([[-1, -1, 7, -1, -1]], [2]) == [[0, 1, None, 0, 1]]
    assert placed([[-1, -1, -1, -1]], [2]) == [[0, 1, 0, 1]]
    assert placed([[-2, -1, -1, -2]], [2, 1]) == [[2, 0, 1, 2]]


def test_tags_count_from_one_in_every_row():
    rows = [[-1, -1, 9], [9, 9, 9], [-2, -1, -2], [9, 9, -1]]
    expected = [[0, 1, None], [None] * 3, [3, 2, 3], [None, None, 4]]
    assert placed(rows, [2, 1, 1, 1]) == expected
    assert placed(rows, [2, 1, 1, 1], [1, 0, 2, 1]) == expected


def test_a_run_does_not_go_on_in_the_next_row():
    assert placed([[9, -1], [-1, 9]], [1, 1]) == [[None, 0], [1, None]]
    with pytest.raises(ValueError, match="row 0 has 1 placeholders.* 2 features"):
        placed([[9, -1], [-1, 9]], [2, 2])


def test_images_without_a_tag_need_the_number_of_images():
    assert placed([[-2, -2, 9], [-1, 9, 9]], [5, 2, 1]) == [[5, 6, None], [7, None, None]]
    with pytest.raises(ValueError, match=r"ask for 2 images \(highest tag of each row: \[1, 1\]\), but 3 came"):
        placed([[-1, -1, 9], [-1, 9, 9]], [2, 5, 1])
    assert placed([[-1, -1, 9], [-1, 9, 9]], [2, 5, 1], [2, 1]) == [[0, 1, None], [7, None, None]]
    assert placed([[9, 9], [9, 9]], [2, 5], [1, 1]) == [[None, None]] * 2


def test_image_token_ids_take_the_images_in_order():
    x = IMAGE_TOKEN
    assert placed([[x, x, 7, x], [7, 7, 7, 7], [x, x, 7, 7]], [2, 1, 2]) == [
        [0, 1, None, 2],
        [None] * 4,
        [3, 4, None, None],
    ]
    assert placed([[x, x, x, x]], [1, 3]) == [[0, 1, 2, 3]]
    assert placed([[x, x, x, 7], [7, 7, x, x]], [1, 2, 2, 3], [2, 2]) == [[0, 1, 2, None], [None, None, 3, 4]]


def test_an_image_token_id_is_text_where_tags_are_used():
    assert placed([[IMAGE_TOKEN, -1, -1], [9, IMAGE_TOKEN, 9]], [2]) == [[None, 0, 1], [None] * 3]


@pytest.mark.parametrize(
    ("rows", "num_tokens", "num_images", "message"),
    [
        ([[-1, -1, -1]], [2], None, "row 0 has 3 placeholders of id -1.*image 1 has 2 features"),
        ([[-1, 9, -1]], [2], None, "row 0 has 1 placeholders"),
        ([[-1, -1]], [2, 2], None, "ask for 1 images.*2 came"),
        ([[-3, -3]], [2], None, "ask for 3 images.*1 came"),
        ([[-1, -1], [-2, -2]], [2, 2], [1, 1], "row 1 uses image tag 2 but has 1 images"),
        ([[-1, -1]], [2], [2], "adds up to 2 images, but 1 came"),
        ([[-1, -1]], [2], [1, 0], "one count for each of the 1 rows"),
        ([[-1, -1]], [2], [-1], "one count for each"),
        ([[IMAGE_TOKEN] * 3], [2], None, r"row 0 has a run of 3 .*\(1, with 2 features\)"),
        ([[IMAGE_TOKEN] * 3], [2, 2], None, r"row 0 has a run of 3 .*\[2, 2\]"),
        ([[IMAGE_TOKEN, 9, IMAGE_TOKEN]], [2], None, "run of 1 image placeholders"),
        ([[IMAGE_TOKEN] * 2], [2, 2], None, "take up 1 images, but 2 came"),
        ([[9, IMAGE_TOKEN], [IMAGE_TOKEN, 9]], [2], None, "row 0 has a run of 1"),
        ([[IMAGE_TOKEN] * 2, [IMAGE_TOKEN] * 2], [2, 2], [2, 0], r"row 1 .*\(0, with 0 features\)"),
        ([[9, 9]], [2], None, "take up 0 images, but 1 came"),
    ],
)
def test_mismatches_name_both_counts(rows, num_tokens, num_images, message):
    with pytest.raises(ValueError, match=message):
        placed(rows, num_tokens, num_images)


def test_random_batches_equal_a_loop_over_tokens():
    generator = np.random.default_rng(0)
    for _ in range(50):
        num_images = generator.integers(0, 4, 3).tolist()
        if not sum(num_images):
            continue
        num_tokens = generator.integers(1, 6, sum(num_images)).tolist()
        rows: list[list[int]] = []
        expected: list[list[int | None]] = []
        for row, count in enumerate(num_images):
            first = sum(num_images[:row])
            ids: list[int] = []
            features: list[int | None] = []
            for tag in generator.permutation([*range(count), *generator.integers(0, max(count, 1), min(count, 2))]):
                words = int(generator.integers(0, 3))
                start = sum(num_tokens[: first + tag])
                ids += [9] * words + [-int(tag) - 1] * num_tokens[first + tag]
                features += [None] * words + [start + offset for offset in range(num_tokens[first + tag])]
            rows.append(ids)
            expected.append(features)
        length = max(map(len, rows)) + 1
        padded = [[9] * (length - len(ids)) + ids for ids in rows]
        wanted = [[None] * (length - len(features)) + features for features in expected]
        assert placed(padded, num_tokens) == wanted
