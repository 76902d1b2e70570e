"""Two real processes over gloo: what `attach` promises under DDP, FSDP2 and the Trainer."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from mvsc import MVSCRegularizer
from mvsc.attach import attach

CLASSES, DIM, STEPS, WORLD = 5, 8, 3, 2


class Segmenter(nn.Module):
    """A model with a loss of its own, and with parameters that it does not use."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)
        self.unused = nn.Linear(CLASSES, CLASSES)

    def forward(self, images, labels):
        features = self.encoder(images).tanh()
        logits = self.classifier(features)
        return F.cross_entropy(logits, labels), features


def ddp(**options):
    return lambda model: DistributedDataParallel(model, **options)


def shard(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def compiled_ddp(model):
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


# The explicit form, which tests/test_distributed.py compares with a single process, comes first.
WIRINGS = {
    "explicit": (ddp(), False, False),
    "DDP": (ddp(), False, False),
    "DDP, find_unused_parameters": (ddp(find_unused_parameters=True), True, False),
    "DDP, static_graph": (ddp(static_graph=True), True, False),
    "DDP, compiled": (compiled_ddp, False, False),
    "FSDP2": (shard, False, False),
    "add_to_loss": (ddp(), False, True),
    "add_to_loss, find_unused_parameters": (ddp(find_unused_parameters=True), True, True),
}
if torch.__version__ < "2.7":
    del WIRINGS["FSDP2"]  # shards on devices only


def train(rank, wiring):
    """Train as a user does; return every parameter that is used, whole."""
    wrap, unused, add_to_loss = WIRINGS[wiring]
    torch.manual_seed(0)
    model = Segmenter()
    if not unused:
        del model.unused
    wrapped = wrap(model)
    explicit = wiring == "explicit"
    reg = (
        MVSCRegularizer(CLASSES, DIM)
        if explicit
        else attach(wrapped, classifier="classifier", add_to_loss=add_to_loss)
    )
    optimizer = torch.optim.SGD([*model.parameters(), *reg.parameters()], lr=0.1)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        images = torch.randn(2, 3, 8, 8, generator=generator)
        labels = torch.randint(0, CLASSES, (2, 8, 8), generator=generator)
        loss, features = wrapped(images, labels)
        if explicit:
            loss = loss + reg(features, labels, model.classifier)
        elif not add_to_loss:
            loss = loss + reg(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    used = [*model.encoder.parameters(), *model.classifier.parameters(), *reg.parameters()]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in used]


def trainer(rank, folder, find_unused_parameters):
    """Run transformers' Trainer on a SegFormer with the one line; return what it trained."""
    import transformers as hf

    from mvsc.integrations.transformers import attach_to_trainer

    torch.manual_seed(0)
    model = hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_labels=CLASSES,
            depths=[1] * 4,
            hidden_sizes=[8, 8, 16, 16],
            decoder_hidden_size=16,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        )
    )
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, CLASSES, (8, 32, 32))
    args = hf.TrainingArguments(
        f"{folder}/{find_unused_parameters}",
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        ddp_find_unused_parameters=find_unused_parameters,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    run = hf.Trainer(model=model, args=args, train_dataset=data)
    reg = attach_to_trainer(run)
    run.train()
    wrapped = run.model_wrapped
    assert isinstance(wrapped, DistributedDataParallel)
    assert wrapped.find_unused_parameters == find_unused_parameters
    return [p.detach().clone() for p in [*model.parameters(), *reg.parameters()]]


def work(rank, folder, with_trainer):
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
    }
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store, timeout, rank=rank, world_size=WORLD)
    results = {wiring: train(rank, wiring) for wiring in WIRINGS}
    if with_trainer:
        for unused in (False, True):
            results[f"Trainer, {unused}"] = trainer(rank, folder, unused)
    torch.save(results, f"{folder}/{rank}.pt")
    if torch.__version__ < "2.7":
        os._exit(0)  # The destructor of its gloo may wait for a thread that waits for the GIL.
    dist.destroy_process_group()


def has_transformers():
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attach")
    torch.multiprocessing.spawn(work, (folder, has_transformers()), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("wiring", [*WIRINGS, "Trainer, False", "Trainer, True"])
def test_all_parameters_are_equal_on_every_process(ranks, wiring):
    if wiring.startswith("Trainer") and not has_transformers():
        pytest.skip("transformers is not installed")
    assert_close(ranks[0][wiring], ranks[1][wiring], rtol=0, atol=0)


@pytest.mark.parametrize("wiring", [wiring for wiring in WIRINGS if wiring != "explicit"])
def test_every_wiring_trains_as_the_explicit_form(ranks, wiring):
    assert_close(ranks[0][wiring], ranks[0]["explicit"])


def test_the_trainer_trains_alike_with_and_without_unused_parameters(ranks):
    if not has_transformers():
        pytest.skip("transformers is not installed")
    assert_close(ranks[0]["Trainer, False"], ranks[0]["Trainer, True"])
