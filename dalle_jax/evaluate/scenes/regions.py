"""Segmentation of an image of a scene: its background, and the regions that differ from it.

The background is fitted as each of the three kinds of the scenes. What differs from it falls into connected regions;
where only faint pixels join two strong parts, a region is also cut in two, and the caller chooses.

S side of the image, H W height and width of one region's window, K places of a cut, 3 color channels."""

import numpy as np

MIN_AREA = 0.006  # fraction of the image; smaller regions are specks (the smallest shape covers 0.02)


def _fit_line(mean_S3, weight_S):
    """Fits along one axis: ((error, curve_S3, jump) of a gradient, the same of two tones).

    mean_S3: mean background color of each line; weight_S: how many pixels it is the mean of."""
    side = len(weight_S)
    t_S = (np.arange(side) + 0.5) / side
    w_S1 = weight_S[:, None]
    total = weight_S.sum()
    center = (weight_S @ t_S) / total
    middle_3 = (weight_S @ mean_S3) / total
    lean_S = weight_S * (t_S - center)
    slope_3 = (lean_S @ mean_S3) / max(lean_S @ t_S, 1e-9)
    ramp_S3 = middle_3 + (t_S - center)[:, None] * slope_3
    ramp = (float((w_S1 * (mean_S3 - ramp_S3) ** 2).sum()), ramp_S3, float(np.sqrt(slope_3 @ slope_3)))
    # Two tones: the cut with the largest spread between its sides, from running sums.
    left_S = np.cumsum(weight_S)
    left_S3 = np.cumsum(w_S1 * mean_S3, 0)
    low, high = side // 4, side - side // 4
    lw, rw = left_S[low:high, None], total - left_S[low:high, None]
    a_K3 = left_S3[low:high] / np.maximum(lw, 1)
    b_K3 = (left_S3[-1] - left_S3[low:high]) / np.maximum(rw, 1)
    k = int(np.argmax((lw * rw)[:, 0] * ((a_K3 - b_K3) ** 2).sum(1)))
    step_S3 = np.where(np.arange(side)[:, None] <= low + k, a_K3[k], b_K3[k])
    jump = float(np.sqrt(((a_K3[k] - b_K3[k]) ** 2).sum()))
    step = (float((w_S1 * (mean_S3 - step_S3) ** 2).sum()), step_S3, jump)
    return ramp, step


def fit_background(image_SS3):
    """Fit the background: (its color at every pixel, its kind), or None if too little of the image is light."""
    light_SS = image_SS3.min(2) > 0.70
    if light_SS.mean() < 0.15:
        return None
    keep_SS = light_SS
    for _ in range(2):  # the second time without what the first fit shows to be an object's edge
        weight_SS = keep_SS.astype(np.float64)
        total = weight_SS.sum()
        kept_SS3 = image_SS3 * weight_SS[:, :, None]
        mean_3 = kept_SS3.sum((0, 1)) / total
        best = (np.inf, "", 0.0, np.zeros(0))
        for axis in (0, 1):
            weight_S = weight_SS.sum(1 - axis)
            mean_S3 = kept_SS3.sum(1 - axis) / np.maximum(weight_S, 1)[:, None]
            spread = float((weight_S[:, None] * (mean_S3 - mean_3) ** 2).sum())
            for kind, (error, curve_S3, jump) in zip(
                ("gradient", "two-tone"), _fit_line(mean_S3, weight_S), strict=True
            ):
                curve_SS3 = curve_S3[:, None] if axis == 0 else curve_S3[None]
                # Lines of the other axis cannot explain this one's spread, so compare what stays unexplained.
                if error - spread < best[0]:
                    best = (error - spread, kind, jump, curve_SS3)
        if best[2] < 0.05:
            kind, ground_SS3 = "plain", np.broadcast_to(mean_3, image_SS3.shape)
        else:
            kind, ground_SS3 = best[1], np.broadcast_to(best[3], image_SS3.shape)
        near_SS = ((image_SS3 - ground_SS3) ** 2).sum(2) < 0.01
        keep_SS = light_SS & near_SS
        if keep_SS.mean() < 0.1:
            return None
    return ground_SS3, kind


def connected_regions(mask_HW) -> list[np.ndarray]:
    """Return the 4-connected regions of a boolean mask as arrays of flat pixel indices.

    Runs of each row are joined to the runs that they touch in the row above, so Python loops over runs, not pixels."""
    height, width = mask_HW.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask_HW
    change = np.diff(padded, axis=1).ravel()
    starts = np.flatnonzero(change == 1)
    ends = np.flatnonzero(change == -1)
    row = starts // (width + 1)
    start, end, row_list = (
        (starts - row * (width + 1)).tolist(),
        (ends - row * (width + 1)).tolist(),
        row.tolist(),
    )
    parent = list(range(len(start)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # first run of the row above that can still touch
    for i in range(len(start)):
        while above < i and (
            row_list[above] < row_list[i] - 1
            or (row_list[above] == row_list[i] - 1 and end[above] <= start[i])
        ):
            above += 1
        j = above
        while j < i and row_list[j] == row_list[i] - 1 and start[j] < end[i]:
            parent[root(j)] = root(i)
            j += 1
    parts: dict[int, list[np.ndarray]] = {}
    for i in range(len(start)):
        parts.setdefault(root(i), []).append(np.arange(start[i], end[i]) + row_list[i] * width)
    return [np.concatenate(part) for part in parts.values()]


def erode(mask_HW):
    """Erode a mask by 3 x 3: drop the pixels that touch its outside, corners included."""
    padded = np.zeros((mask_HW.shape[0] + 2, mask_HW.shape[1] + 2), bool)
    padded[1:-1, 1:-1] = mask_HW
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    return rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]


def dilate(mask_HW):
    """Dilate a mask by 3 x 3."""
    return ~erode(~np.pad(mask_HW, 1))[1:-1, 1:-1] if mask_HW.size else mask_HW


def overlap_fractions(own_HW, seeds) -> list[np.ndarray]:
    """Divide a mask between seeds in it, each pixel to the seed whose dilation reaches it first."""
    parts = [seed_HW.copy() for seed_HW in seeds]
    free_HW = own_HW & ~np.logical_or.reduce(parts)
    left = -1
    while left != (left := int(free_HW.sum())):
        for part_HW in parts:
            new_HW = free_HW & dilate(part_HW)
            part_HW |= new_HW
            free_HW &= ~new_HW
    return parts


def flood_fill(mask_HW, seed_HW):
    """Return the connected regions of a mask that contain a pixel of the seed."""
    reached_HW = np.zeros(mask_HW.shape, bool)
    for part in connected_regions(mask_HW):
        if seed_HW.ravel()[part].any():
            reached_HW.ravel()[part] = True
    return reached_HW


def _peak(strength_SS):
    """Largest value within two pixels of each pixel."""
    side = len(strength_SS)
    padded = np.zeros((side + 4, side + 4))
    padded[2:-2, 2:-2] = strength_SS
    rows = padded[:-4].copy()
    for k in range(1, 5):
        np.maximum(rows, padded[k : side + k], out=rows)
    peak_SS = rows[:, :-4].copy()
    for k in range(1, 5):
        np.maximum(peak_SS, rows[:, k : side + k], out=peak_SS)
    return peak_SS


def bounding_box(flat, width):
    """Return top, left, bottom, right of flat pixel indices in an image of that width, all inclusive."""
    rows, columns = flat // width, flat % width
    return rows.min(), columns.min(), rows.max(), columns.max()


def _holds_box(outer, inner):
    return outer[0] <= inner[0] and outer[1] <= inner[1] and outer[2] >= inner[2] and outer[3] >= inner[3]


def _separate(flat, cores, side) -> list[np.ndarray]:
    """A region cut where only faint pixels join its cores; itself if there is nothing to cut."""
    cores = sorted((c for c in cores if len(c) >= 0.5 * MIN_AREA * side * side), key=len, reverse=True)
    kept: list[tuple] = []
    for core in cores:  # what lies within another core's box is its guest or a piece of it, not a neighbor
        box = bounding_box(core, side)
        if not any(_holds_box(other, box) for other, _ in kept):
            kept.append((box, core))
    if len(kept) < 2:
        return [flat]
    masks = np.zeros((1 + len(kept), side * side), bool)
    masks[0, flat] = True
    for mask, (_, core) in zip(masks[1:], kept, strict=True):
        mask[core] = True
    own_SS, *seeds = masks.reshape(-1, side, side)
    return [np.flatnonzero(part) for part in overlap_fractions(own_SS, seeds)]


def regions_of_objects(image_SS3, ground_SS3):
    """Return [(region that differs from the background, the pieces that it may be cut into)]."""
    side = len(image_SS3)
    strength_SS = np.sqrt(((image_SS3 - ground_SS3) ** 2).sum(2))
    loose = [flat for flat in connected_regions(strength_SS > 0.2) if len(flat) >= MIN_AREA * side * side]
    strong_SS = (strength_SS > 0.2) & (strength_SS > 0.55 * _peak(strength_SS))
    cores = connected_regions(strong_SS)
    of_pixel = np.full(side * side, -1)
    for i, flat in enumerate(loose):
        of_pixel[flat] = i
    parts: list[list[np.ndarray]] = [[] for _ in loose]
    for core in cores:
        if of_pixel[core[0]] >= 0:
            parts[of_pixel[core[0]]].append(core)
    return [(flat, _separate(flat, own, side)) for flat, own in zip(loose, parts, strict=True)]
