"""Two real processes over gloo on this machine."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from mvsc import MVSCRegularizer, distributed, equations, sampling
from mvsc.segment import segment_sum

WORLD = 2
CLASSES, DIM, GROUPS = 5, 4, 3


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, images):
        features = self.encoder(images).tanh()
        return features, self.classifier(features)


def batch(rank, step=0):
    """Give each process other classes and sizes, and the second no labelled pixel at times."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(1 + rank, 3, 6, 6 + rank, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (1 + rank, 6, 6 + rank), generator=generator) + 2 * rank
    if rank == 1 and step % 2:
        labels.fill_(255)
    return images, labels


def segmenter():
    torch.manual_seed(0)
    return Segmenter().double()


def train(wrap, rank):
    """Take 6 steps of AdamW and return every parameter."""
    model, reg = segmenter(), MVSCRegularizer(CLASSES, DIM, GROUPS).double()
    parameters = [*model.parameters(), *reg.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    classifier = model.classifier
    if wrap == "inside":
        model.reg = reg
    model = DistributedDataParallel(model)
    if wrap == "own":
        reg = DistributedDataParallel(reg)
    for step in range(6):
        images, labels = batch(rank, step)
        optimizer.zero_grad()
        features, logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
        (loss + reg(features, labels, classifier)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def gradients(rank, **options):
    """Take one step and return the loss and the gradients that the optimizer would see."""
    model, reg = segmenter(), MVSCRegularizer(CLASSES, DIM, GROUPS, **options).double()
    parallel = DistributedDataParallel(model)
    images, labels = batch(rank)
    features, logits = parallel(images)
    loss = reg(features, labels, model.classifier)
    (loss + 0 * logits.sum()).backward()
    return loss.detach(), [p.grad for p in [*model.parameters(), *reg.parameters()]]


def work(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    alone = [dist.new_group([each]) for each in range(WORLD)][rank]
    results = {
        "initial": MVSCRegularizer(CLASSES, DIM).centroids.detach().clone(),
        **{f"train {wrap}": train(wrap, rank) for wrap in ("bare", "own", "inside")},
        "local means": gradients(rank),
        "global means": gradients(rank, sync_means=True),
        "no sync": gradients(rank, sync=False),
        "alone": gradients(rank, process_group=alone, sync_means=True),
        "split": draw(rank),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def draw(rank):
    reg = MVSCRegularizer(1, DIM, GROUPS)
    key = sampling.stream_key(reg.seed, reg.step, distributed.rank())
    return sampling.draw_groups(torch.zeros(1, 8, 8, dtype=torch.int64), GROUPS, 1, key)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def by_one_process(**options):
    """Compute what each process should see, one after the other, in this one."""
    results = []
    for rank in range(WORLD):
        model, reg = segmenter(), MVSCRegularizer(CLASSES, DIM, GROUPS, **options).double()
        images, labels = batch(rank)
        features, _ = model(images)
        reg.step += 1
        key = sampling.stream_key(reg.seed, reg.step, rank)
        cells = sampling.draw_groups(
            sampling.labels_on_grid(labels, labels.shape[1:], CLASSES, 255), GROUPS, CLASSES, key
        )
        results.append((model, reg, *segment_sum(features, cells, GROUPS * CLASSES)))
    return results


def loss_of_sums(model, reg, sums, counts):
    means, present = equations.class_group_means(sums, counts, GROUPS)
    order = sampling.draw_halves(GROUPS, sampling.stream_key(reg.seed, reg.step))
    weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    targets = equations.global_centroids(reg.centroids)
    return reg.total(
        equations.MVSCTerms(
            equations.alignment_loss(means, targets, present, reg.temperature),
            equations.centroid_pull_loss(reg.centroids, order),
            equations.centroid_classification_loss(
                equations.enhance_centroids(reg.centroids, means),
                present,
                lambda vectors: vectors @ weight.T + bias,
            ),
        )
    )


def test_centroids_start_equal_with_no_communication(processes):
    assert_close(processes[0]["initial"], processes[1]["initial"], rtol=0, atol=0)


@pytest.mark.parametrize("wrap", ["bare", "own", "inside"])
def test_every_parameter_stays_bitwise_equal_over_processes(processes, wrap):
    first, second = (result[f"train {wrap}"] for result in processes)
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", ["own", "inside"])
def test_wrapping_the_regularizer_changes_nothing(processes, wrap):
    assert_close(processes[0][f"train {wrap}"], processes[0]["train bare"])


def test_gradients_are_the_means_of_the_single_processes(processes):
    each = by_one_process()
    expected = []
    for rank, (model, reg, sums, counts) in enumerate(each):
        loss = loss_of_sums(model, reg, sums, counts)
        assert_close(processes[rank]["local means"][0], loss.detach(), rtol=1e-12, atol=0)
        expected.append(torch.autograd.grad(loss, [*model.parameters(), *reg.parameters()]))
    averaged = [sum(gradients) / WORLD for gradients in zip(*expected, strict=True)]
    for rank in range(WORLD):
        assert_close(processes[rank]["local means"][1], averaged, rtol=1e-12, atol=1e-15)


def test_means_over_processes_are_those_of_the_concatenated_batch(processes):
    (model, reg, *first), (other, _, *second) = by_one_process()
    sums, counts = first[0] + second[0], first[1] + second[1]
    loss = loss_of_sums(model, reg, sums, counts)
    # The second process's encoder is a copy: its share of the gradient is added.
    parameters = [*model.parameters(), *reg.parameters()]
    expected = list(torch.autograd.grad(loss, parameters, retain_graph=True))
    shares = torch.autograd.grad(loss, list(other.encoder.parameters()))
    for position, share in enumerate(shares):
        expected[position] = expected[position] + share
    for rank in range(WORLD):
        value, gradients = processes[rank]["global means"]
        assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        assert_close(gradients, expected, rtol=1e-12, atol=1e-15)


def test_without_sync_the_centroids_gradients_differ(processes):
    first, second = (result["no sync"][1][-1] for result in processes)
    assert not torch.allclose(first, second)
    averaged = processes[0]["local means"][1][-1]
    assert_close((first + second) / WORLD, averaged, rtol=1e-12, atol=1e-15)


def test_a_process_group_of_one_is_a_single_process(processes):
    for rank in range(WORLD):
        loss = processes[rank]["alone"][0]
        model, reg, sums, counts = by_one_process()[rank]
        # In a group of its own every process has rank 0.
        if rank == 0:
            assert_close(loss, loss_of_sums(model, reg, sums, counts).detach())
        assert loss.isfinite()


def test_each_process_draws_its_own_split(processes):
    assert not torch.equal(processes[0]["split"], processes[1]["split"])
