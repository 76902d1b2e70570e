"""Equations (1) to (5) in NumPy, float64, plain loops, straight from the paper's page.

Imports nothing from mvsc. Every function is holomorphic where it has to be, so an input with a
tiny imaginary part gives derivatives to the last digit (complex-step differentiation), the
stop-gradient of Eq. (4) included: it drops the imaginary part.
"""

import numpy as np

EPS = 1e-6


def labels_on_grid(labels, size, num_classes, ignore_index):
    """Label at the centre of each feature pixel; None where it does not count."""
    batch, *full_size = labels.shape
    grid = np.full((batch, *size), None, dtype=object)
    for b, *place in np.ndindex(grid.shape):
        # The centre of pixel i lies at (i + 1/2) H / h, in units of label pixels.
        centre = [
            int(np.floor((2 * i + 1) * full / (2 * n)))
            for i, full, n in zip(place, full_size, size, strict=True)
        ]
        label = int(labels[(b, *centre)])
        if 0 <= label < num_classes and label != ignore_index:
            grid[(b, *place)] = label
    return grid


def means(features, grid, group_of, groups, num_classes):
    """Eq. (1): mean feature of each cell; None for a cell without pixels."""
    cells = [[[] for _ in range(num_classes)] for _ in range(groups)]
    for index in np.ndindex(grid.shape):
        if grid[index] is not None:
            cells[group_of[index]][grid[index]].append(np.moveaxis(features, 1, -1)[index])
    return [[sum(pixels) / len(pixels) if pixels else None for pixels in row] for row in cells]


def alignment(cell_means, centroids, temperature, align_to="global"):
    """Eq. (2)."""
    groups, num_classes, _ = centroids.shape
    in_batch = [
        c for c in range(num_classes) if any(cell_means[g][c] is not None for g in range(groups))
    ]
    losses = []
    for g in range(groups):
        for c in in_batch:
            if cell_means[g][c] is None:
                continue
            logits = {}
            for k in in_batch:
                if align_to == "group":
                    target = centroids[g, k]
                else:
                    target = sum(centroids[i, k] for i in range(groups)) / groups
                logits[k] = cosine(cell_means[g][c], target) / temperature
            losses.append(cross_entropy(list(logits.values()), list(logits).index(c)))
    return sum(losses) / len(losses) if losses else 0.0


def pull(centroids, half_a, half_b):
    """Eq. (3) for the given halves of the groups."""
    groups, num_classes, _ = centroids.shape
    if groups == 1:
        return 0.0
    losses = []
    for c in range(num_classes):
        a = sum(centroids[g, c] for g in half_a) / len(half_a)
        b = sum(centroids[g, c] for g in half_b) / len(half_b)
        losses.append(1 - cosine(a, b))
    return sum(losses) / len(losses)


def classification(cell_means, centroids, weight, bias, enhance=True):
    """Eq. (4) and L_v, for a linear classifier."""
    groups, num_classes, _ = centroids.shape
    losses = []
    for g in range(groups):
        for c in range(num_classes):
            mean = cell_means[g][c]
            if mean is None:
                continue
            vector = centroids[g, c]
            if enhance:
                vector = vector + (mean - np.real(mean))
            logits = [sum(vector * weight[k]) + bias[k] for k in range(num_classes)]
            losses.append(cross_entropy(logits, c))
    return sum(losses) / len(losses) if losses else 0.0


def total(align, pulled, classified, weights=(0.1, 1.0, 0.05)):
    """What Eq. (5) adds to the cross-entropy of the pixels."""
    return weights[0] * align + weights[1] * pulled + weights[2] * classified


def cosine(a, b):
    """Cosine, with lengths sqrt(|x|^2 + EPS^2)."""
    length_a, length_b = np.sqrt(sum(a * a) + EPS**2), np.sqrt(sum(b * b) + EPS**2)
    return sum(a * b) / (length_a * length_b)


def cross_entropy(logits, target):
    """Minus the log of the softmax at ``target``."""
    shift = max(np.real(logit) for logit in logits)
    return np.log(sum(np.exp(logit - shift) for logit in logits)) + shift - logits[target]


def derivative(function, argument):
    """Gradient of a real function by complex steps, one entry of ``argument`` at a time."""
    step = 1e-200
    gradient = np.zeros(argument.shape)
    for index in np.ndindex(argument.shape):
        nudged = argument.astype(complex)
        nudged[index] += 1j * step
        gradient[index] = np.imag(function(nudged)) / step
    return gradient
