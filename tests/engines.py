"""Train in two processes under an engine: run by tests/test_engines.py, once for all rows.

    python tests/engines.py FOLDER "FSDP2" "Accelerate, FSDP2" ...

Leaves one file a row in FOLDER: what both processes trained, or the error of one.
"""

import functools
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mvsc

# What every host asks for processes and devices.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "DS_BUILD_OPS": "0",
    "TORCHELASTIC_RUN_ID": "engines",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
}

CLASSES, DIM, STEPS, WORLD, LR = 6, 8, 3, 2, 0.1
SGD = functools.partial(torch.optim.SGD, lr=LR)
RATES = 0.0, 0.01
"""Of the encoder, which is frozen, and the classifier, where they are groups of their own."""


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
        self.classifier = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, images):
        return self.classifier(self.encoder(images).tanh())


class OfTokens(nn.Module):
    """What tensor parallelism can split: layers that are Linear."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 3, padding=1)
        self.middle = nn.Linear(DIM, DIM)
        self.classifier = nn.Linear(DIM, CLASSES)

    def forward(self, images):
        features = self.encoder(images).tanh().movedim(1, -1)
        return self.classifier(self.middle(features)).movedim(-1, 1)


def build(kind=Segmenter, optimizer=SGD, **options):
    """Return a model and its regularizer, attached as the page says: before the engine comes."""
    torch.manual_seed(0)
    model = kind()
    return model, mvsc.attach(model, classifier="classifier", optimizer=optimizer, **options)


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return images, torch.randint(0, CLASSES, (2, 8, 8), generator=generator)


def loss_of(model, reg, images, labels):
    return F.cross_entropy(model(images), labels) + reg(labels)


def loop(rank, model, reg, optimizer):
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, reg, *batch(rank, step)).backward()
        optimizer.step()


def whole(parameter):
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "full_tensor"):
        parameter = parameter.full_tensor()
    return parameter.detach().clone()


def trained(model, reg):
    mvsc.assert_in_sync(reg)
    return {
        "first layer": whole(model.encoder.weight).float(),
        "classifier": whole(model.classifier.weight).float(),
        "centroids": reg.regularizer.centroids.detach().clone(),
    }


# One process, with the mean gradient of two: what all have to come to.


def in_groups(model, reg=None):
    """Make an optimizer whose groups have rates of their own."""
    pairs = zip(model.children(), RATES, strict=True)
    groups = [{"params": each.parameters(), "lr": lr} for each, lr in pairs]
    if reg is not None:
        groups.append({"params": reg.parameters(), "lr": RATES[-1]})
    return torch.optim.Adam(groups)


def alone(kind=Segmenter, ranks=WORLD, parts=1, groups=False):
    """Train on the mean over the batches of each process, or over parts of one process."""
    model, reg = build(kind, optimizer="host")
    optimizer = SGD([*model.parameters(), *reg.parameters()])
    if groups:
        optimizer = in_groups(model, reg)
    rank_of = mvsc.distributed.rank
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            for rank in range(ranks):
                mvsc.distributed.rank = lambda group=None, rank=rank: rank
                loss = loss_of(model, reg, *batch(rank, step * parts + part))
                (loss / ranks / parts).backward()
                if rank < ranks - 1:
                    reg.regularizer.step -= 1  # Both processes are in the same step.
        optimizer.step()
    mvsc.distributed.rank = rank_of
    return trained(model, reg)


# torch.


def ddp(rank, **options):
    model, reg = build(**options)
    optimizer = SGD(model.parameters())
    loop(rank, DistributedDataParallel(model), reg, optimizer)
    return trained(model, reg)


def zero_redundancy(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, reg = build()
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=LR)
    loop(rank, parallel, reg, optimizer)
    return trained(model, reg)


def fsdp2(rank, reshard=None):
    model, reg = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=reshard)
    loop(rank, model, reg, SGD(model.parameters()))
    assert hasattr(model.classifier.weight, "full_tensor")
    return trained(model, reg)


def tensor_parallel(rank, style):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model = OfTokens()
    plans = {
        "column": {"classifier": ColwiseParallel(output_layouts=Replicate())},
        "row": {"middle": ColwiseParallel(), "classifier": RowwiseParallel()},
    }
    parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plans[style])
    # The processes see the same images: each is alone with its centroids.
    mine = [dist.new_group([each]) for each in range(WORLD)][rank]
    reg = mvsc.attach(model, classifier="classifier", optimizer=SGD, process_group=mine)
    optimizers = [SGD([parameter]) for parameter in model.parameters()]  # Split and whole ones.
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, reg, *batch(0, step)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert hasattr(model.classifier.weight, "full_tensor")
    return trained(model, reg)


def pipeline(rank):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(0)
    whole_model = Segmenter()
    first, last = (
        nn.Sequential(whole_model.encoder, nn.Tanh()),
        nn.Sequential(whole_model.classifier),
    )
    mine = [dist.new_group([each]) for each in range(WORLD)][rank]
    stage_model, reg = (first, last)[rank], None
    if rank == 1:
        reg = mvsc.attach(last, classifier="0", optimizer=SGD, process_group=mine)
    images = torch.zeros(2, 3, 8, 8)
    features = torch.zeros(2, DIM, 8, 8, requires_grad=True)
    logits = torch.zeros(2, CLASSES, 8, 8, requires_grad=True)
    ends = (
        {"input_args": (images,), "output_args": (features,), "output_grads": (features.detach(),)}
        if rank == 0
        else {
            "input_args": (features,),
            "output_args": (logits,),
            "input_grads": (features.detach(),),
        }
    )
    stage = PipelineStage(stage_model, rank, WORLD, torch.device("cpu"), **ends)
    schedule = ScheduleGPipe(
        stage,
        n_microbatches=2,
        loss_fn=lambda out, labels: F.cross_entropy(out, labels) + reg(labels),
    )
    optimizer = SGD(stage_model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [batch(0, 2 * step + part) for part in range(2)]
        images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        schedule.step(images) if rank == 0 else schedule.step(target=labels, losses=[])
        optimizer.step()
    results = {
        "first layer": whole_model.encoder.weight.detach().clone(),
        "classifier": whole_model.classifier.weight.detach().clone(),
        "centroids": torch.empty(4, CLASSES, DIM)
        if reg is None
        else reg.regularizer.centroids.detach().clone(),
    }
    for name, owner in {"first layer": 0, "classifier": 1, "centroids": 1}.items():
        dist.broadcast(results[name], owner)
    return results


# DeepSpeed.


def deepspeed_config(stage, accumulate=1):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # 1.0 by default, which no other row has
    }


def zero(rank, stage, accumulate=1, dtype=None, groups=False):
    import deepspeed

    model, reg = build(optimizer="own" if groups else SGD)
    optimizer = in_groups(model) if groups else SGD(model.parameters())
    config = deepspeed_config(stage, accumulate)
    if dtype is not None:
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.zero_optimization_stage() == stage
    for step in range(STEPS * accumulate):
        images, labels = batch(rank, step)
        loss = F.cross_entropy(engine(images.to(dtype)).float(), labels) + reg(labels)
        engine.backward(loss)
        engine.step()
    assert reg.regularizer.centroids.dtype == torch.float32
    return trained(model, reg)


# Accelerate.


def accelerate(rank, plugin=None, accumulate=1):
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    expected, options = DistributedType.MULTI_CPU, {"cpu": True}
    if plugin == "FSDP2":
        on_a_cpu_as_on_a_device("MULTI_GPU")
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        expected = DistributedType.FSDP
        options = {
            "fsdp_plugin": FullyShardedDataParallelPlugin(
                fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="no_wrap"
            )
        }
    elif plugin is not None:
        on_a_cpu_as_on_a_device("MULTI_CPU")
        expected = DistributedType.DEEPSPEED
        config = deepspeed_config(plugin, accumulate)
        options = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, **options)
    assert accelerator.distributed_type == expected, accelerator.distributed_type
    assert accelerator.num_processes == WORLD
    model, reg = build()
    parallel, optimizer = accelerator.prepare(model, SGD(model.parameters()))
    for step in range(STEPS * accumulate):
        with accelerator.accumulate(parallel):
            accelerator.backward(loss_of(parallel, reg, *batch(rank, step)))
            optimizer.step()
            optimizer.zero_grad()
    return trained(accelerator.unwrap_model(parallel), reg)


def on_a_cpu_as_on_a_device(kind):
    """Let Accelerate use an engine over gloo: it looks for a device, the code below it does not."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType(kind))


# transformers' Trainer.


def segformer():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.SegformerConfig(
        num_labels=CLASSES,
        depths=[1] * 4,
        hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=16,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = hf.SegformerForSemanticSegmentation(config).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # Each process has its own statistics.
            module.train(False)
            module.train = lambda mode=True, module=module: module
    # Accelerate asks for them, and SegFormer raises.
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    return model


def pictures():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": torch.randint(0, CLASSES, (32, 32), generator=generator),
        }
        for _ in range(STEPS * 2 * WORLD)
    ]


def trained_segformer(model, reg):
    named = nn.Module()
    named.encoder = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    named.classifier = model.decode_head.classifier
    return trained(named, reg)


def alone_segformer():
    model, rank_of = segformer(), mvsc.distributed.rank
    reg = mvsc.attach(model, add_to_loss=True)
    optimizer = SGD([*model.parameters(), *reg.parameters()])
    data = pictures()
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            mvsc.distributed.rank = lambda group=None, rank=rank: rank
            mine = data[4 * step + 2 * rank : 4 * step + 2 * rank + 2]
            inputs = {name: torch.stack([each[name] for each in mine]) for name in mine[0]}
            (model(**inputs).loss / WORLD).backward()
            if rank < WORLD - 1:
                reg.regularizer.step -= 1
        optimizer.step()
    mvsc.distributed.rank = rank_of
    return trained_segformer(model, reg)


def trainer(rank, engine=None, folder=None, resume=None):
    """Run the Trainer; with a folder, save in its second step and return the file of its last."""
    if engine is not None:
        on_a_cpu_as_on_a_device("MULTI_GPU" if engine == "FSDP2" else "MULTI_CPU")
    import transformers as hf

    from mvsc.integrations.transformers import attach_to_trainer

    options = {}
    if engine == "FSDP2":
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {"version": 2, "fsdp_version": 2, "auto_wrap_policy": "NO_WRAP"}
    elif engine is not None:
        options["deepspeed"] = deepspeed_config(engine)
    if folder is not None:
        options |= {"save_steps": 1}
    model = segformer()
    args = hf.TrainingArguments(
        folder or os.environ["ENGINES_FOLDER"],
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=LR,
        optim="sgd" if folder is None else "adamw_torch",  # which has a state to resume
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        average_tokens_across_devices=False,  # else the host's loss is multiplied, see the page
        save_strategy="no" if folder is None else "steps",
        report_to="none",
        use_cpu=engine is None,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        train_sampling_strategy="sequential",
        **options,
    )
    run = hf.Trainer(model=model, args=args, train_dataset=pictures())
    assert run.args.world_size == WORLD
    reg = attach_to_trainer(run, optimizer=SGD)
    run.train(resume_from_checkpoint=resume)
    kind = {None: "DistributedDataParallel", "FSDP2": "FSDPSegformerForSemanticSegmentation"}
    assert type(run.model_wrapped).__name__ == kind.get(engine, "DeepSpeedEngine")
    return trained_segformer(model, reg)


def resumed_trainer(rank, engine=None):
    """Return what a resumed run comes to, minus what one that did not stop comes to."""
    folder = f"{os.environ['ENGINES_FOLDER']}/resumed-{engine}"
    first = trainer(rank, engine, folder)
    second = trainer(rank, engine, f"{folder}-again", f"{folder}/checkpoint-{STEPS - 1}")
    return {name: second[name] - first[name] for name in first}


# Lightning.


def lightning(rank, strategy="ddp", manual=False, steps=STEPS, begin=None, end=None):
    """Train from a checkpoint, if one is given, and to one."""
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.reg = build()
            self.automatic_optimization = not manual

        def configure_model(self):
            if strategy == "model_parallel":
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, _, index):
            # Of the step, since Lightning's loader begins again within an epoch.
            loss = loss_of(self.model, self.reg, *batch(rank, self.global_step))
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return None if manual else loss

        def configure_optimizers(self):
            return SGD(self.model.parameters())

    if strategy == "model_parallel":
        strategy_ = ModelParallelStrategy(WORLD, 1, process_group_backend="gloo")
    else:
        strategy_ = strategy
    run = lightning.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy_,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False,
    )
    module = Module()
    run.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=None), ckpt_path=begin)
    assert run.world_size == WORLD
    if end is not None:
        run.save_checkpoint(end)
    return trained(module.model, module.reg)


def resumed_lightning(rank, strategy):
    """Return what a resumed run comes to, minus what one that did not stop comes to."""
    middle = f"{os.environ['ENGINES_FOLDER']}/{strategy}.ckpt"
    first = lightning(rank, strategy)
    lightning(rank, strategy, steps=STEPS - 1, end=middle)
    second = lightning(rank, strategy, begin=middle)
    return {name: second[name] - first[name] for name in first}


part = functools.partial
ROWS = {
    "DDP": (ddp, alone),
    "ZeroRedundancyOptimizer": (zero_redundancy, alone),
    "FSDP2": (fsdp2, alone),
    "FSDP2, resharded": (part(fsdp2, reshard=True), alone),
    "tensor parallel, column": (
        part(tensor_parallel, style="column"),
        part(alone, OfTokens, ranks=1),
    ),
    "tensor parallel, row": (part(tensor_parallel, style="row"), part(alone, OfTokens, ranks=1)),
    "pipeline": (pipeline, part(alone, ranks=1, parts=2)),
    "Accelerate, DDP": (accelerate, alone),
    "Accelerate, DDP, accumulated": (part(accelerate, accumulate=2), part(alone, parts=2)),
    "Accelerate, FSDP2": (part(accelerate, plugin="FSDP2"), alone),
    "Trainer, DDP": (trainer, alone_segformer),
    "Trainer, FSDP2": (part(trainer, engine="FSDP2"), alone_segformer),
    "Trainer, FSDP2, resumed": (part(resumed_trainer, engine="FSDP2"), None),
    "Lightning, ddp": (lightning, alone),
    "Lightning, ddp, manual": (part(lightning, manual=True), alone),
    "Lightning, ModelParallelStrategy": (part(lightning, strategy="model_parallel"), alone),
    "Lightning, ModelParallelStrategy, resumed": (
        part(resumed_lightning, strategy="model_parallel"),
        None,
    ),
    "DeepSpeed, ZeRO-1": (part(zero, stage=1), alone),
    "DeepSpeed, ZeRO-2": (part(zero, stage=2), alone),
    "DeepSpeed, ZeRO-3": (part(zero, stage=3), alone),
    "DeepSpeed, ZeRO-2, groups": (part(zero, stage=2, groups=True), part(alone, groups=True)),
    "DeepSpeed, ZeRO-3, groups": (part(zero, stage=3, groups=True), part(alone, groups=True)),
    "DeepSpeed, ZeRO-3, accumulated": (part(zero, stage=3, accumulate=2), part(alone, parts=2)),
    "DeepSpeed, ZeRO-2, bfloat16": (part(zero, stage=2, dtype=torch.bfloat16), alone),
    "Accelerate, DeepSpeed ZeRO-2": (part(accelerate, plugin=2), alone),
    "Accelerate, DeepSpeed ZeRO-3": (part(accelerate, plugin=3), alone),
    "Trainer, DeepSpeed ZeRO-2": (part(trainer, engine=2), alone_segformer),
    "Trainer, DeepSpeed ZeRO-3": (part(trainer, engine=3), alone_segformer),
    "Trainer, DeepSpeed ZeRO-2, resumed": (part(resumed_trainer, engine=2), None),
}
EXAMPLES = {
    "accelerate_fsdp2": "accelerate",
    "deepspeed_loop": "deepspeed",
    "lightning_ddp": "lightning",
    "pipeline": "torch",
}
"""Files in examples/integrations for more than one process, and what they need."""

OWN_GROUPS = ("DDP", "Zero", "FSDP2", "tensor", "pipeline")  # make no group of processes themselves


def work(row, rank, folder, port):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "ENGINES_FOLDER": folder,
    }
    result = None
    try:
        if row.startswith("DeepSpeed"):
            import deepspeed

            deepspeed.init_distributed("gloo", verbose=False)
        elif row.startswith(OWN_GROUPS):
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        result = ROWS[row][0](rank)
        assert dist.get_world_size() == WORLD
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/{row}-{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo's destructor may wait for a thread that waits for the GIL.


def compare(row, folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    pair = [context.Process(target=work, args=(row, rank, folder, port)) for rank in range(WORLD)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(100)
        process.kill()


def reference(row, folder):
    make = ROWS[row][1]
    torch.save(None if make is None else make(), f"{folder}/{row}-alone.pt")


# Costs and faults: run by the tests themselves, in processes of their own.


def join(rank, world, folder, store="store", seconds=60):
    os.environ |= ENVIRONMENT
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    place = f"file://{folder}/{store}"
    dist.init_process_group("gloo", place, timedelta(seconds=seconds), rank=rank, world_size=world)


def count_bytes(rank, world, folder):
    """Count what this process writes in a step, for each pair of (own, sync_means)."""

    def written():
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["wchar"])

    join(rank, world, folder)
    classes, dim, counted = 20, 64, {}
    for own, sync_means in product((False, True), repeat=2):
        options = {"optimizer": "own" if own else "host", "sync_means": sync_means}
        reg = mvsc.MVSCRegularizer(classes, dim, **options)
        classifier = nn.Conv2d(dim, classes, 1)
        optimizer = SGD(classifier.parameters())
        features = torch.randn(1, dim, 8, 8, requires_grad=True)
        labels = torch.randint(0, classes, (1, 8, 8))

        def step(reg=reg, inputs=(features, labels, classifier), optimizer=optimizer):
            reg(*inputs).backward()
            optimizer.step()

        step()
        dist.barrier()
        before = written()
        for _ in range(5):
            step()
        counted[own, sync_means] = (written() - before) / 5
        dist.barrier()
    torch.save(counted, f"{folder}/{rank}.pt")
    os._exit(0)


def die_in_a_step(rank, world, folder, kind, fate="killed"):
    """Save after two steps; in the third the second process meets its fate.

    It is killed before its backward; or runs out of memory in it, and ends, or goes on without.
    """
    join(rank, world, folder, seconds=60 if fate == "killed" else 5)

    def out_of_memory(grad):
        raise torch.OutOfMemoryError

    model, reg = build(optimizer=kind)
    parameters = [*model.parameters(), *reg.parameters()]
    parallel, optimizer = DistributedDataParallel(model), SGD(parameters)
    for step in range(3):
        if step == 2 and rank == 0:
            torch.save(reg.state_dict(), f"{folder}/mvsc.part")
            Path(f"{folder}/mvsc.part").replace(f"{folder}/mvsc.pt")
        loss = loss_of(parallel, reg, *batch(rank, step))
        if step == 2 and rank == 1:
            if fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            loss.register_hook(out_of_memory)
        began = time.monotonic()
        try:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        except torch.OutOfMemoryError:
            time.sleep(0 if fate == "ends" else 15)
            os._exit(3)
        except RuntimeError as error:
            torch.save((str(error), time.monotonic() - began), f"{folder}/error.pt")
    os._exit(0)


def go_on(rank, world, folder, kind):
    join(rank, world, folder, "another")
    model, reg = build(optimizer=kind)
    reg.load_state_dict(torch.load(f"{folder}/mvsc.pt"))
    optimizer = SGD([*model.parameters(), *reg.parameters()])
    loop(rank, DistributedDataParallel(model), reg, optimizer)
    torch.save(trained(model, reg), f"{folder}/{rank}.pt")
    os._exit(0)


def main(folder, *rows):
    os.environ |= ENVIRONMENT
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # Once, before the processes split off.
    import importlib

    hosts = {
        "Accelerate": "accelerate",
        "Trainer": "transformers.trainer",
        "Lightning": "lightning",
    }
    hosts["DeepSpeed"] = "deepspeed"
    for name, module in hosts.items():
        if any(name in row for row in rows):
            importlib.import_module(module)
    for row in rows:
        context = torch.multiprocessing.get_context("fork")
        one = context.Process(target=reference, args=(row, folder))
        one.start()
        compare(row, folder)
        one.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
