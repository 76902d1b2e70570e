"""Two and three real processes over gloo on this machine, against a single one."""

import copy
import os
import re
import textwrap
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from batches import FORMS, Net
from mvsc import MVSCRegularizer, assert_in_sync, distributed, equations, sampling
from mvsc.kernel import segment_sum

CLASSES, DIM, GROUPS = 5, 4, 3
STEPS = 20
WIRINGS = {
    "bare": {},
    "DDP(reg)": {},
    "submodule": {},
    "inside forward": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "tiny buckets": {"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True},
    "accumulated": {},
    "clipped": {},
    "compiled": {},
}
FSDP2_ON_CPU = torch.__version__ >= "2.7"
if FSDP2_ON_CPU:
    WIRINGS |= {"FSDP2": {}, "FSDP2 child": {}, "FSDP2 inside": {}, "FSDP2 resharded": {}}
BY_THREE = [wiring for wiring in WIRINGS if wiring not in ("tiny buckets", "clipped")]
PROCESSES = Path(__file__).parents[1] / "docs" / "processes.md"


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, images, labels=None):
        features = self.encoder(images).tanh()
        logits = self.classifier(features)
        if labels is not None:
            return logits, self.reg(features, labels, self.classifier)
        return features, logits


def batch(rank, step):
    """Give each process other classes and sizes, and the second no labelled pixel at times."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(1 + rank, 3, 6, 6 + rank, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (1 + rank, 6, 6 + rank), generator=generator) + rank
    if rank == 1 and step % 3 == 2:
        labels.fill_(255)
    return images, labels


def make(**options):
    torch.manual_seed(0)
    return Segmenter().double(), MVSCRegularizer(CLASSES, DIM, GROUPS, **options).double()


def cross_entropy(logits, labels):
    # Unlike the mean, the sum of nothing is 0.
    return nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / 20


def micro_steps(wiring, step):
    return [2 * step, 2 * step + 1] if wiring == "accumulated" else [step]


def train(wiring, rank, steps=STEPS, group=None):
    """Train as the user of a wiring does; return every parameter, whole, and what the check says.

    ``rank`` is that in the group, which is all processes if it is None.
    """
    model, reg = make(process_group=group)
    plain, options = model, {"process_group": group, **WIRINGS[wiring]}
    within = wiring in ("inside forward", "FSDP2 inside")
    if within or wiring == "submodule":
        model.reg = reg
    if wiring.startswith("FSDP2"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if wiring == "FSDP2 child":
            fully_shard(model.classifier, mesh=mesh)
        # Else the root's weights stay whole from its forward to its backward.
        fully_shard(model, mesh=mesh, reshard_after_forward=wiring == "FSDP2 resharded" or None)
    else:
        model = DistributedDataParallel(model, **options)
    parameters = list(dict.fromkeys([*plain.parameters(), *reg.parameters()]))
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    call = reg
    if wiring == "DDP(reg)":
        call = DistributedDataParallel(reg)
    elif wiring == "compiled":
        call = torch.compile(reg, fullgraph=True, backend="aot_eager")
    for step in range(steps):
        optimizer.zero_grad()
        micro = micro_steps(wiring, step)
        for number in micro:
            images, labels = batch(rank, number)
            last = number == micro[-1]
            with nullcontext() if last else model.no_sync():
                if within:
                    logits, regularization = model(images, labels)
                else:
                    features, logits = model(images)
                    regularization = call(features, labels, plain.classifier)
                (cross_entropy(logits, labels) + regularization).backward()
        if wiring == "clipped":
            nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
    parameters = [*plain.encoder.parameters(), *plain.classifier.parameters(), reg.centroids]
    return whole(parameters), in_sync(reg)


def whole(parameters):
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in parameters
    ]


def gradients(rank, step=0, group=None, **options):
    """Take one step and return the loss and the gradients that the optimizer would see."""
    model, reg = make(process_group=group, **options)
    reg.step += step
    parallel = DistributedDataParallel(model, process_group=group)
    images, labels = batch(rank, step)
    features, logits = parallel(images)
    loss = reg(features, labels, model.classifier)
    (loss + 0 * logits.sum()).backward()
    return loss.detach(), [p.grad for p in [*model.parameters(), *reg.parameters()]]


def form(axes, rows, **options):
    """Return a model of a form and its regularizer; with one group nothing depends on draws."""
    torch.manual_seed(0)
    reg = MVSCRegularizer(CLASSES, DIM, groups=1, **options)
    return Net(axes, rows, DIM, CLASSES).double(), reg.double()


def batch_of_form(rank, axes):
    generator = torch.Generator().manual_seed(rank)
    size = (7, 6, 5)[:axes]
    inputs = torch.randn(1 + rank, 2, *size, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (1 + rank, *size), generator=generator) + rank


def gradients_of_form(rank, axes, rows, **options):
    """Take one step with a map of a form: its loss, and the gradients after averaging."""
    model, reg = form(axes, rows, **options)
    inputs, labels = batch_of_form(rank, axes)
    parallel = DistributedDataParallel(model)
    features, logits = parallel(inputs)
    loss = reg(features, labels, model.classifier)
    (loss + 0 * logits.sum()).backward()
    return loss.detach(), [p.grad for p in [*model.parameters(), *reg.parameters()]]


def in_sync(reg):
    try:
        assert_in_sync(reg)
    except RuntimeError as error:
        return str(error)
    return "in sync"


def drifted(rank, group=None):
    reg = MVSCRegularizer(CLASSES, DIM, process_group=group)
    with torch.no_grad():
        reg.centroids[0, 0, 0] += rank
    return in_sync(reg)


def skipping(rank):
    """Train by the recipe on the page; the second process has no finite loss in one step."""
    recipe = re.search(r"^   ```\n(.*?)^   ```", PROCESSES.read_text("utf-8"), re.M | re.S)
    assert recipe is not None
    model, reg = make()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *reg.parameters()], lr=0.01)
    steps_taken = []
    for step in range(4):
        images, labels = batch(rank, step)
        if (rank, step) == (1, 1):
            images.fill_(torch.nan)
        features, logits = parallel(images)
        loss = cross_entropy(logits, labels) + reg(features, labels, model.classifier)
        optimizer.zero_grad()
        exec(textwrap.dedent(recipe[1]), {"torch": torch, "loss": loss})
        optimizer.step()
        steps_taken.append(reg.centroids.grad is not None)
    return steps_taken, whole([*model.parameters(), *reg.parameters()])


def copied(group):
    reg = MVSCRegularizer(CLASSES, DIM, process_group=group)
    return copy.deepcopy(nn.ModuleList([reg]))[0].process_group is group


def counted(rank):
    """Return what a regularizer in DistributedDataParallel counts on each process."""
    reg = MVSCRegularizer(CLASSES, DIM)
    with torch.no_grad():
        reg.invalid_count += 5 + rank
    features, labels = torch.randn(1, DIM, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    DistributedDataParallel(reg)(features, labels, nn.Conv2d(DIM, CLASSES, 1))
    return reg.invalid_count.item()


def sharded_kernel():
    """Return the loss for a 3 x 3 classifier that is whole, and for one sharded on its own."""
    found = []
    for shard in (False, True):
        torch.manual_seed(0)
        classifier = nn.Conv2d(DIM, CLASSES, 3, padding=1)
        if shard:
            fully_shard(classifier, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        features, labels = torch.randn(1, DIM, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
        found.append(MVSCRegularizer(CLASSES, DIM)(features, labels, classifier).item())
    return found


def outside(group):
    """Return the message for a process that is not in the regularizer's group."""
    reg = MVSCRegularizer(CLASSES, DIM, process_group=group)
    features, labels = torch.zeros(1, DIM, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    try:
        reg(features, labels, nn.Conv2d(DIM, CLASSES, 1))
    except ValueError as error:
        return str(error)
    return "accepted"


def nowhere():
    """Return what the check says of centroids that are NaN on every process."""
    reg = MVSCRegularizer(CLASSES, DIM)
    nn.init.constant_(reg.centroids, torch.nan)
    return in_sync(reg)


def reset_from_meta():
    """Return the first centroids of a regularizer that was sharded before it had any memory."""
    with torch.device("meta"):
        reg = MVSCRegularizer(CLASSES, DIM, GROUPS)
    fully_shard(reg, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    reg.to_empty(device="cpu").reset_parameters()
    return whole(reg.parameters())[0]


def in_mixed_precision(rank):
    """Return the loss of a regularizer inside FSDP2's mixed precision, and its gradient."""
    model, reg = make()
    model.float().reg = reg.float()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    images, labels = batch(rank, 0)
    logits, loss = model(images.float(), labels)
    (loss + 0 * logits.float().sum()).backward()
    return loss.detach(), reg.centroids.grad.full_tensor()


def work(rank, folder, world, wirings):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    alone = [dist.new_group([each]) for each in range(world)][rank]
    results = {wiring: train(wiring, rank) for wiring in wirings}
    if world == 3:
        # The middle process trains something else, or nothing at all.
        pair = dist.new_group([0, 2])
        if rank != 1:
            results |= {
                "pair": train("bare", rank // 2, group=pair),
                "pair, global means": gradients(rank // 2, group=pair, sync_means=True),
                "pair, drifted": drifted(rank, pair),
            }
        else:
            results["outside"] = outside(pair)
    if world == 2:
        results |= {
            "initial": MVSCRegularizer(CLASSES, DIM).centroids.detach().clone(),
            "local means": gradients(rank),
            "global means": gradients(rank, sync_means=True),
            "global means, one empty": gradients(rank, 2, sync_means=True),
            "no sync": gradients(rank, sync=False),
            "alone": gradients(rank, group=alone, sync_means=True),
            "skipping": skipping(rank),
            "copied": copied(alone),
            "counted": counted(rank),
            "in sync": in_sync(MVSCRegularizer(CLASSES, DIM)),
            "drifted": drifted(rank),
            "nowhere": nowhere(),
            "other sizes": in_sync(MVSCRegularizer(CLASSES, DIM, groups=1 + rank)),
            **{each: gradients_of_form(rank, *each) for each in FORMS},
            **{
                (*each, "global"): gradients_of_form(rank, *each, sync_means=True) for each in FORMS
            },
        }
    if world == 2 and FSDP2_ON_CPU:
        results |= {
            "sharded kernel": sharded_kernel(),
            "reset from meta": reset_from_meta(),
            "mixed precision": in_mixed_precision(rank),
        }
    torch.save(results, f"{folder}/{rank}.pt")
    if torch.__version__ < "2.7":
        os._exit(0)  # The destructor of its gloo may wait for a thread that waits for the GIL.
    dist.destroy_process_group()


def spawn(tmp_path_factory, world, wirings):
    folder = tmp_path_factory.mktemp(f"world{world}")
    torch.multiprocessing.spawn(work, (folder, world, wirings), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return spawn(tmp_path_factory, 2, list(WIRINGS))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return spawn(tmp_path_factory, 3, BY_THREE)


def cell_sums(model, reg, rank, step):
    """Repeat in this process what process ``rank`` sums up in its step."""
    images, labels = batch(rank, step)
    features, logits = model(images)
    grid = sampling.labels_on_grid(labels, labels.shape[1:], CLASSES, 255)
    cells = sampling.draw_groups(grid, GROUPS, CLASSES, reg.step, reg.seed, rank)
    return *segment_sum(features, cells, GROUPS * CLASSES), cross_entropy(logits, labels)


def loss_of(model, reg, sums, counts):
    means, present = equations.class_group_means(sums, counts, GROUPS)
    halves = sampling.draw_halves(GROUPS, reg.step, reg.seed, reg.centroids.dtype)
    weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    targets = equations.global_centroids(reg.centroids)
    return reg.total(
        equations.MVSCTerms(
            equations.alignment_loss(means, targets, present, reg.temperature),
            equations.centroid_pull_loss(reg.centroids, halves),
            equations.centroid_classification_loss(
                equations.enhance_centroids(reg.centroids, means) @ weight.T + bias, present
            ),
        )
    )


def trajectory(wiring, world):
    """Train in this process alone, on the mean of the gradients of all processes."""
    model, reg = make()
    parameters = [*model.parameters(), *reg.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in micro_steps(wiring, step):
            reg.step += 1
            for rank in range(world):
                sums, counts, ce = cell_sums(model, reg, rank, number)
                ((ce + loss_of(model, reg, sums, counts)) / world).backward()
        if wiring == "clipped":
            nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
    return whole(parameters)


def one_step(step=0):
    """Return model, regularizer and the summed cells of each of two processes in a step."""
    results = []
    for rank in range(2):
        model, reg = make()
        reg.step += step + 1
        results.append((model, reg, *cell_sums(model, reg, rank, step)[:2]))
    return results


@pytest.mark.parametrize("wiring", WIRINGS)
def test_parameters_stay_bitwise_equal_on_two_processes(two, wiring):
    assert_close(two[0][wiring][0], two[1][wiring][0], rtol=0, atol=0)
    assert two[0][wiring][1] == two[1][wiring][1] == "in sync"


@pytest.mark.parametrize("wiring", WIRINGS)
def test_two_processes_walk_the_path_of_the_mean_gradient(two, wiring):
    assert_close(two[0][wiring][0], trajectory(wiring, 2), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("wiring", BY_THREE)
def test_three_processes_walk_the_path_of_the_mean_gradient(three, wiring):
    for other in three[1:]:
        assert_close(other[wiring][0], three[0][wiring][0], rtol=0, atol=0)
    assert_close(three[0][wiring][0], trajectory(wiring, 3), rtol=1e-5, atol=1e-8)


def test_centroids_start_equal_with_no_communication(two):
    assert_close(two[0]["initial"], two[1]["initial"], rtol=0, atol=0)


def test_gradients_are_the_means_of_the_single_processes(two):
    expected = []
    for rank, (model, reg, sums, counts) in enumerate(one_step()):
        loss = loss_of(model, reg, sums, counts)
        assert_close(two[rank]["local means"][0], loss.detach(), rtol=1e-12, atol=0)
        expected.append(torch.autograd.grad(loss, [*model.parameters(), *reg.parameters()]))
    averaged = [sum(gradients) / 2 for gradients in zip(*expected, strict=True)]
    for rank in range(2):
        assert_close(two[rank]["local means"][1], averaged, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("result", "step"), [("global means", 0), ("global means, one empty", 2)])
def test_means_over_processes_are_those_of_the_concatenated_batch(two, result, step):
    (model, reg, *first), (other, _, *second) = one_step(step)
    assert (second[1].sum() == 0) == (result == "global means, one empty")
    loss = loss_of(model, reg, first[0] + second[0], first[1] + second[1])
    # The second process's encoder is a copy: its share of the gradient is added.
    parameters = [*model.parameters(), *reg.parameters()]
    expected = list(torch.autograd.grad(loss, parameters, retain_graph=True))
    shares = torch.autograd.grad(loss, list(other.encoder.parameters()))
    for position, share in enumerate(shares):
        expected[position] = expected[position] + share
    for rank in range(2):
        value, gradients = two[rank][result]
        assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        assert_close(gradients, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("axes", "rows"), FORMS)
def test_a_map_of_any_form_is_trained_by_two_processes_as_by_one(two, axes, rows):
    expected, losses = [], []
    for rank in range(2):
        model, reg = form(axes, rows)
        inputs, labels = batch_of_form(rank, axes)
        loss = reg(model(inputs)[0], labels, model.classifier)
        expected.append(torch.autograd.grad(loss, [*model.parameters(), *reg.parameters()]))
        losses.append(loss.detach())
    averaged = [sum(gradients) / 2 for gradients in zip(*expected, strict=True)]
    for rank in range(2):
        value, gradients = two[rank][axes, rows]
        assert_close(value, losses[rank], rtol=1e-12, atol=0)
        assert_close(gradients, averaged, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("axes", "rows"), FORMS)
def test_global_means_of_any_form_are_those_of_the_concatenated_batch(two, axes, rows):
    model, reg = form(axes, rows)
    inputs, labels = (
        torch.cat(each) for each in zip(batch_of_form(0, axes), batch_of_form(1, axes), strict=True)
    )
    loss = reg(model(inputs)[0], labels, model.classifier)
    expected = torch.autograd.grad(loss, [*model.parameters(), *reg.parameters()])
    for rank in range(2):
        value, gradients = two[rank][axes, rows, "global"]
        assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        assert_close(gradients, list(expected), rtol=1e-11, atol=1e-14)


def test_without_sync_the_gradients_of_the_centroids_differ(two):
    first, second = (result["no sync"][1][-1] for result in two)
    assert not torch.allclose(first, second)
    averaged = two[0]["local means"][1][-1]
    assert_close((first + second) / 2, averaged, rtol=1e-12, atol=1e-15)


def test_a_process_group_of_one_is_a_single_process(two):
    # In a group of its own each process has rank 0, and nothing is summed over the others.
    model, reg, sums, counts = one_step()[0]
    assert_close(two[0]["alone"][0], loss_of(model, reg, sums, counts).detach())
    assert not torch.allclose(two[0]["alone"][1][-1], two[1]["alone"][1][-1])


def test_two_of_three_processes_are_as_two(two, three):
    for position, rank in enumerate((0, 2)):
        assert_close(three[rank]["pair"][0], two[position]["bare"][0], rtol=0, atol=0)
        assert three[rank]["pair"][1] == "in sync"
        found, expected = three[rank]["pair, global means"], two[position]["global means"]
        assert_close(found, expected, rtol=1e-12, atol=1e-15)
        assert "got ranks 0 and 1 that differ" in three[rank]["pair, drifted"]


def test_a_process_outside_the_group_is_refused_by_name(three):
    assert three[1]["outside"].startswith("process_group must hold this process, got")


def test_a_copy_communicates_in_the_group_of_the_original(two):
    assert two[0]["copied"]


def test_a_step_that_one_process_cannot_take_is_skipped_by_all_with_the_recipe(two):
    for steps_taken, parameters in (result["skipping"] for result in two):
        assert steps_taken == [True, False, True, True]
        assert all(parameter.isfinite().all() for parameter in parameters)
    assert_close(two[0]["skipping"][1], two[1]["skipping"][1], rtol=0, atol=0)


def test_inside_distributed_data_parallel_the_counter_is_that_of_the_first_process(two):
    assert [result["counted"] for result in two] == [5, 5]


def test_each_process_draws_its_own_split():
    labels, step = torch.zeros(1, 8, 8, dtype=torch.int64), torch.tensor(1)
    splits = [sampling.draw_groups(labels, GROUPS, 1, step, 0, rank) for rank in range(2)]
    assert not torch.equal(*splits)


def test_drifted_centroids_are_found(two):
    for result in two:
        assert result["in sync"] == "in sync"
        assert "centroids must be equal on every process, got ranks 0 and 1" in result["drifted"]


def test_other_sizes_are_found(two):
    for result in two:
        assert "on rank 1. Build it with the same sizes everywhere." in result["other sizes"]


def test_nan_on_every_process_is_in_sync(two):
    assert [result["nowhere"] for result in two] == ["in sync", "in sync"]


SHARDED = pytest.mark.skipif(not FSDP2_ON_CPU, reason="torch 2.6 shards on devices only")


@SHARDED
def test_a_regularizer_that_was_sharded_without_memory_gets_its_first_centroids(two):
    for result in two:
        expected = MVSCRegularizer(CLASSES, DIM, GROUPS).centroids.detach()
        assert_close(result["reset from meta"], expected, rtol=0, atol=0)


@SHARDED
def test_in_mixed_precision_of_fsdp2_the_loss_and_the_gradient_stay_float32(two):
    (value, gradient), (_, other) = (result["mixed precision"] for result in two)
    assert value.dtype == gradient.dtype == torch.float32
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert_close(gradient, other, rtol=0, atol=0)


@SHARDED
def test_a_large_kernel_may_be_sharded_on_its_own(two):
    whole, sharded = two[0]["sharded kernel"]
    assert sharded == pytest.approx(whole, rel=1e-5)


def test_a_single_process_is_in_sync_with_itself():
    assert distributed.world_size() == 1
    assert_in_sync(MVSCRegularizer(CLASSES, DIM))
