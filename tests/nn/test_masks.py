"""The attention masks, cell by cell, against their written definitions (Ramesh et al. 2021, B.1)."""

import numpy as np
import pytest

from dalle_jax.nn.masks import attention_mask

KINDS = ("full", "row", "column", "conv", "conv_clamped", "conv_torus")


def attends(kind: str, q: int, k: int, side: int, window: int) -> bool:
    """Whether image token q of the raster attends to image token k, directly from the definition."""
    if k > q:  # the future
        return False
    if kind == "full":
        return True
    if kind == "row":  # itself and the `side` tokens before it in the raster
        return k in [q - n for n in range(side + 1)]
    if kind == "column":  # tokens in the column of q
        return k % side == q % side
    if kind in (
        "conv_clamped",
        "conv_torus",
    ):  # ruDALL-E: the window around the key, its cells clamped or wrapped
        row, column, half = *divmod(k, side), window // 2
        cells = [
            (row + up, column + left) for up in range(-half, half + 1) for left in range(-half, half + 1)
        ]
        if kind == "conv_torus":
            cells = [(r % side, c % side) for r, c in cells]
        else:
            cells = [(max(min(r, side - 1), 0), max(min(c, side - 1), 0)) for r, c in cells]
        return divmod(q, side) in cells
    # The causal half of a window centered on q: cells in the rows above, and in the row of q those left of it and
    # itself. Cells are raster indices, so a cell beyond the end of a row is in the next row.
    half = window // 2
    above = [(up, left) for up in range(1, half + 1) for left in range(-half, half + 1)]
    beside = [(0, left) for left in range(half + 1)]
    return any(k == q - up * side - left for up, left in above + beside)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("text", "side", "window"), [(3, 4, 3), (1, 5, 5), (2, 3, 11), (4, 6, 1), (2, 1, 3)])
def test_every_cell(kind, text, side, window):
    mask = attention_mask(kind, text, side, window)
    length = text + side * side
    assert mask.shape == (length, length) and mask.dtype == bool
    for q in range(length):
        for k in range(length):
            if q < text:  # text is causal and does not attend to the image
                want = k <= q
            elif k < text:  # the image attends to all text
                want = True
            else:
                want = attends(kind, q - text, k - text, side, window)
            assert mask[q, k] == want, f"{kind}: position {q} and {k}"


def test_keys_per_image_token_in_the_paper():
    """S = 32: 33 keys (row), at most 32 (column), 61 (conv, 11x11); a step reads 256 + 33, not 1280."""
    side, text = 32, 256
    masks = {kind: attention_mask(kind, text, side, 11) for kind in KINDS}
    keys = {kind: mask[text:, text:].sum(axis=1).reshape(side, side) for kind, mask in masks.items()}
    inner = np.s_[5:, 5:]  # at least half a window below the top and from the left edge
    assert (keys["row"][1:] == 33).all() and keys["row"].max() == 33
    np.testing.assert_array_equal(keys["row"][0], np.arange(1, 33))
    np.testing.assert_array_equal(keys["column"], np.repeat(np.arange(1, 33)[:, None], 32, axis=1))
    assert (keys["conv"][inner] == 61).all() and keys["conv"].max() == 61
    assert keys["conv"][0, 0] == 1 and keys["conv"][0, 10] == 6
    np.testing.assert_array_equal(keys["full"].ravel(), np.arange(1, 1025))
    for whole in masks.values():
        assert (whole[text:, :text].sum(axis=1) == 256).all()
        assert not whole[:text, text:].any()
        np.testing.assert_array_equal(whole[:text, :text].sum(axis=1), np.arange(1, 257))


def test_conv_wraps_around_row_ends_as_the_raster_does():
    """Token (2, 0) of a 6 x 6 raster, window 3: the cell left of the start of a row is the end of the row above."""
    seen = attention_mask("conv", 1, 6, 3)[1 + 12, 1:]
    assert sorted(np.flatnonzero(seen)) == [5, 6, 7, 11, 12]  # (0,5) (1,0) (1,1) (1,5) (2,0)


def test_unknown_kind():
    with pytest.raises(
        ValueError,
        match="Expected attention kind to be one of full, row, column, conv, conv_clamped, conv_torus, got 'col'",
    ):
        attention_mask("col", 2, 3)


def test_masks_are_shared_so_they_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        attention_mask("row", 2, 3)[0, 0] = False
