import math

import pytest
import torch
from torch.testing import assert_close

from mvsc import equations
from mvsc.equations import (
    MVSCTerms,
    alignment_loss,
    centroid_classification_loss,
    centroid_pull_loss,
    class_group_means,
    enhance_centroids,
    global_centroids,
    weighted_sum,
)

ALL = torch.ones(1, 2, dtype=torch.bool)


def test_an_empty_cell_has_mean_zero_and_is_not_present():
    means, present = class_group_means(torch.tensor([[4.0], [0.0]]), torch.tensor([2, 0]), groups=2)
    assert_close(means, torch.tensor([[[2.0]], [[0.0]]]))
    assert present.tolist() == [[True], [False]]


def test_cells_are_laid_out_group_by_group():
    sums = torch.arange(6.0).unsqueeze(-1)
    means, _ = class_group_means(sums, torch.ones(6, dtype=torch.int64), groups=2)
    assert_close(means.squeeze(-1), torch.tensor([[0.0, 1, 2], [3, 4, 5]]))


def test_the_global_centroid_is_the_mean_over_groups():
    centroids = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    assert_close(global_centroids(centroids), torch.tensor([[2.0, 4.0]]))


def test_alignment_of_orthogonal_classes_is_the_softmax_by_hand():
    loss = alignment_loss(torch.eye(2).unsqueeze(0), torch.eye(2), ALL, temperature=0.5)
    assert_close(loss.item(), math.log(1 + math.exp(-2)))


def test_alignment_does_not_depend_on_the_length_of_either_side():
    means, targets = torch.randn(3, 2, 5), torch.randn(2, 5)
    present = torch.ones(3, 2, dtype=torch.bool)
    loss = alignment_loss(means, targets, present, 0.07)
    assert_close(alignment_loss(means * 1e4, targets * 1e-2, present, 0.07), loss)


def test_negatives_are_only_the_classes_of_the_batch():
    means, targets = torch.randn(2, 3, 4), torch.randn(3, 4)
    present = torch.tensor([[True, True, False], [False, True, False]])
    # Class 2 is absent: moving its centroid changes nothing, and with one class left there is
    # nothing to be pushed from.
    loss = alignment_loss(means, targets, present, 0.07)
    moved = targets.clone()
    moved[2] = means[0, 0]
    assert_close(alignment_loss(means, moved, present, 0.07), loss, rtol=0, atol=0)
    alone = alignment_loss(means[:, :1], targets[:1], present[:, :1], 0.07)
    assert alone.item() == 0


def test_alignment_averages_over_present_cells():
    means, targets = torch.randn(2, 2, 4), torch.randn(2, 4)
    present = torch.tensor([[True, True], [True, False]])
    per_cell = []
    for g, c in [(0, 0), (0, 1), (1, 0)]:
        logits = torch.cosine_similarity(means[g, c], targets, dim=-1) / 0.3
        per_cell.append(-logits.log_softmax(0)[c])
    assert_close(alignment_loss(means, targets, present, 0.3), torch.stack(per_cell).mean())


def test_alignment_to_the_own_group_uses_that_groups_centroids():
    means, centroids = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    present = torch.ones(2, 3, dtype=torch.bool)
    each = [
        alignment_loss(means[g : g + 1], centroids[g], present[g : g + 1], 0.07) for g in range(2)
    ]
    assert_close(alignment_loss(means, centroids, present, 0.07), torch.stack(each).mean())


def test_alignment_trains_both_sides():
    means, targets = torch.randn(1, 2, 3).requires_grad_(), torch.randn(2, 3).requires_grad_()
    alignment_loss(means, targets, ALL, 0.07).backward()
    assert means.grad is not None
    assert targets.grad is not None
    assert means.grad.abs().sum() > 0
    assert targets.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_alignment_has_finite_gradients_at_zero_vectors(value):
    means = torch.full((1, 2, 3), value, requires_grad=True)
    targets = torch.full((2, 3), value, requires_grad=True)
    loss = alignment_loss(means, targets, ALL, 0.07)
    loss.backward()
    assert_close(loss.item(), math.log(2))
    assert means.grad is not None
    assert targets.grad is not None
    assert means.grad.isfinite().all()
    assert targets.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_alignment_is_finite_at_the_edges_of_the_temperature(temperature):
    means = torch.randn(1, 2, 3, requires_grad=True)
    loss = alignment_loss(means, torch.randn(2, 3), ALL, temperature)
    loss.backward()
    assert loss.isfinite()
    assert means.grad is not None
    assert means.grad.isfinite().all()


def halves(a, b):
    """Return what each group weighs in the means of two halves, given by their groups."""
    weights = torch.zeros(2, len(a) + len(b))
    weights[0, a], weights[1, b] = 1 / len(a), 1 / len(b)
    return weights


def test_pull_is_one_minus_the_cosine_of_the_halves():
    centroids = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[-1.0, 1.0]]])
    # Halves {0, 2} and {1, 3}: (1, 1/2) and (-1/2, 1) are orthogonal.
    assert_close(centroid_pull_loss(centroids, halves([0, 2], [1, 3])).item(), 1.0)
    # Halves {0, 1} and {2, 3}: (1/2, 1/2) and (0, 1) are 45 degrees apart.
    loss = centroid_pull_loss(centroids, halves([0, 1], [2, 3])).item()
    assert_close(loss, 1 - math.sqrt(0.5))


def test_an_odd_number_of_groups_is_split_into_floor_and_ceil():
    centroids = torch.randn(3, 2, 4)
    by_hand = 1 - torch.cosine_similarity(centroids[1], (centroids[0] + centroids[2]) / 2, dim=-1)
    assert_close(centroid_pull_loss(centroids, halves([1], [2, 0])), by_hand.mean())


def test_pull_averages_over_all_classes_and_lowers_when_groups_agree():
    same = torch.randn(1, 3, 4).expand(2, 3, 4)
    opposite = torch.stack([same[0], -same[0]])
    each = halves([0], [1])
    assert_close(centroid_pull_loss(same, each).item(), 0.0, atol=1e-6, rtol=0)
    assert_close(centroid_pull_loss(opposite, each).item(), 2.0)


def test_pull_of_a_single_group_is_exactly_zero_and_connected():
    centroids = torch.full((1, 2, 3), torch.inf, requires_grad=True)
    loss = centroid_pull_loss(centroids, torch.tensor([[0.0], [1.0]]))
    loss.backward()
    assert loss.item() == 0
    assert_close(centroids.grad, torch.zeros(1, 2, 3), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4, 1e30])
def test_enhanced_centroids_keep_their_value_bitwise(scale):
    centroids, means = torch.randn(2, 3, 4), torch.randn(2, 3, 4) * scale
    assert_close(enhance_centroids(centroids, means), centroids, rtol=0, atol=0)


def test_enhancement_passes_the_gradient_unchanged_to_both():
    centroids = torch.randn(2, 3, 4, requires_grad=True)
    means = torch.randn(2, 3, 4, requires_grad=True)
    sent = torch.randn(2, 3, 4)
    enhance_centroids(centroids, means).backward(sent)
    assert_close(centroids.grad, sent, rtol=0, atol=0)
    assert_close(means.grad, sent, rtol=0, atol=0)


def test_classification_is_the_cross_entropy_of_each_present_centroid():
    enhanced, weight = torch.randn(2, 3, 4), torch.randn(3, 4)
    present = torch.tensor([[True, False, True], [False, False, True]])
    log_softmax = (enhanced @ weight.T).log_softmax(-1)
    by_hand = -(log_softmax[0, 0, 0] + log_softmax[0, 2, 2] + log_softmax[1, 2, 2]) / 3
    loss = centroid_classification_loss(enhanced @ weight.T, present)
    assert_close(loss, by_hand)


@pytest.mark.parametrize("term", ["align", "classify"])
def test_nothing_present_gives_exactly_zero_with_zero_gradients(term):
    vectors = torch.randn(2, 3, 4, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    if term == "align":
        loss = alignment_loss(vectors, torch.randn(3, 4), nothing, 0.07)
    else:
        loss = centroid_classification_loss(vectors[:, :, :3], nothing)
    loss.backward()
    assert loss.item() == 0
    assert_close(vectors.grad, torch.zeros(2, 3, 4), rtol=0, atol=0)


def test_what_the_classifier_answers_for_an_absent_cell_never_matters():
    present = torch.tensor([[True, False]])
    logits = torch.tensor([[[1.0, 1.0], [torch.inf, torch.nan]]])
    loss = centroid_classification_loss(logits, present)
    assert_close(loss.item(), math.log(2))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_an_empty_batch_is_clean_under_anomaly_detection():
    means = torch.randn(1, 2, 3, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        alignment_loss(means, torch.randn(2, 3), ~ALL, 0.07).backward()


def test_a_nan_in_a_present_mean_stays_visible():
    means = torch.randn(1, 2, 3)
    means[0, 0, 0] = torch.nan
    assert alignment_loss(means, torch.randn(2, 3), ALL, 0.07).isnan()
    enhanced = enhance_centroids(torch.randn(1, 2, 3), means)
    assert centroid_classification_loss(enhanced[:, :, :2], ALL).isnan()


def test_the_weights_are_in_the_order_of_the_terms():
    terms = MVSCTerms(torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0))
    assert weighted_sum(terms, (1.0, 2.0, 3.0)).item() == 321


def test_a_term_of_weight_zero_is_left_out_even_if_it_is_nan():
    terms = MVSCTerms(torch.tensor(1.0), torch.tensor(torch.nan), torch.tensor(1.0))
    assert weighted_sum(terms, (1.0, 0.0, 1.0)).item() == 2


@pytest.mark.parametrize("name", ["alignment_loss", "centroid_pull_loss"])
def test_gradients_of_any_order_are_those_of_finite_differences(name):
    present = torch.tensor([[True, True, False], [True, False, False]])
    targets = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    centroids = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    if name == "alignment_loss":
        inputs = (centroids, targets)

        def loss(means, targets):
            return equations.alignment_loss(means, targets, present, 0.5)
    else:
        inputs = (centroids,)

        def loss(centroids):
            return equations.centroid_pull_loss(centroids, halves([1], [0]).double())

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)
