"""Does ``torch.compile`` make the regularizer faster, and are its numbers the same?

python benchmarks/bench_compile.py            # writes benchmarks/results/
python benchmarks/bench_compile.py --quick    # tiny: equality only, writes nothing
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from measure import command_line, medians, write
from mvsc import MVSCRegularizer


def main() -> None:
    device, quick = command_line(__doc__)
    classes, dim, side = (5, 8, 8) if quick else (171, 256, 128)
    backend = "aot_eager" if quick else "inductor"
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        features = torch.randn(4, dim, side, side, device=device).contiguous(memory_format=layout)
        features.requires_grad_()
        labels = torch.randint(0, classes, (4, 4 * side, 4 * side), device=device)
        head = nn.Conv2d(dim, classes, 1).to(device)
        eager = MVSCRegularizer(classes, dim).to(device)
        twin = copy.deepcopy(eager)
        compiled = torch.compile(twin, fullgraph=True, backend=backend)
        ways = {
            "eager": partial(step, eager, eager, features, labels, head),
            "compiled": partial(step, compiled, twin, features, labels, head),
        }
        for _ in range(3):
            assert_close(ways["compiled"](), ways["eager"](), rtol=1e-4, atol=1e-6)
        times = medians(ways, 1 if quick else 21)
        name = "channels_last" if layout == torch.channels_last else "contiguous"
        rows.append({"layout": name, **{f"{way} ms": time for way, time in times.items()}})
    if not quick:
        write(
            "bench_compile",
            device,
            {"Regularizer, forward + backward (B=4, D=256, 128 x 128, C=171, G=4)": rows},
        )


def step(
    call: nn.Module, reg: MVSCRegularizer, features: Tensor, labels: Tensor, head: nn.Conv2d
) -> tuple[Tensor, ...]:
    loss = call(features, labels, head)
    return loss.detach(), *torch.autograd.grad(loss, [features, reg.centroids, head.weight])


if __name__ == "__main__":
    main()
