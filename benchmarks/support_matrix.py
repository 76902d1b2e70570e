"""Which models `mvsc.attach` supports: build each, train a step, check every claim, write a page.

    python benchmarks/support_matrix.py                 # the libraries that are installed here
    python benchmarks/support_matrix.py torchvision     # one of them
    python benchmarks/support_matrix.py --render        # only write the page again

Models (`support_cases.py`) are built from their configuration with random weights; nothing is
downloaded. A run replaces the rows of its libraries in `benchmarks/results/support_matrix.jsonl`,
one line a model, and writes `docs/support_matrix.md`, so a library may live in an environment of
its own. A row works only if

- attach, or what its refusal says to write, took the right layer, and so did `example=`;
- attach and detach changed no key of the state dict and no bit of the output in evaluation;
- the tapped features, sent through the picked classifier, gave the model's own logits, and came
  from before a dropout wherever one fed the classifier;
- align and classify changed the gradient of the encoder, and pull did not;
- a step on the sum of all losses moved the centroids and left every parameter finite.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mvsc.attach import AttachedRegularizer, ClassifierNotFoundError, attach
from mvsc.classifier import base_of, widths
from mvsc.finding import find_classifier
from support_cases import CLASSES, LIBRARIES, Case

ROWS = Path(__file__).parent / "results" / "support_matrix.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "support_matrix.md"
NAMED = re.compile(r'mvsc\.attach\(model, classifier="(.+?)"\)')


@dataclass(frozen=True)
class Row:
    """One line of the table and of the file."""

    library: str
    version: str
    model: str
    path: str = ""
    kernel: str = ""
    dim: int | None = None
    stride: int | None = None
    tap: str = ""
    result: str = ""
    note: str = ""


def examine(library: str, release: str, case: Case) -> Row:
    """Build the model of a case, check every claim, and return its row."""
    torch.manual_seed(0)
    model = case.build()
    row = partial(Row, library, release, case.model, note=case.note)
    inputs = case.inputs() if case.inputs else torch.randn(2, 3, case.size, case.size)
    if case.refused:
        check_refusal(model, inputs, case)
        return row(result="refused")

    keys, logits = list(model.state_dict()), evaluate(model, inputs, case)
    reg, result = attach_as_told(model, inputs, case)
    proved = find_classifier(model, None, inputs) if result != "works, named" else case.path
    require(proved == reg.classifier_path, f"example= takes {proved}")
    require(list(model.state_dict()) == keys, "attach changed the state dict")
    require(torch.equal(evaluate(model, inputs, case), logits), "attach changed the output")
    features, tap = check_tap(model, reg, inputs, logits)
    check_step(model, reg, inputs, case)
    trained = evaluate(model, inputs, case)
    reg.detach()
    require(list(model.state_dict()) == keys, "detach changed the state dict")
    require(torch.equal(evaluate(model, inputs, case), trained), "detach changed the output")

    classifier = model.get_submodule(reg.classifier_path)
    kernel = getattr(base_of(classifier), "kernel_size", None)
    # Of tokens the grid is not to be seen.
    maps = isinstance(inputs, Tensor) and (features.ndim > 3 or inputs.ndim == 3)
    stride = inputs.shape[-1] // features.shape[-1] if maps else None
    return row(
        reg.classifier_path,
        "linear" if kernel is None else "x".join(map(str, kernel)),
        widths(classifier)[0],
        stride,
        tap,
        result,
    )


def attach_as_told(model: nn.Module, inputs: Any, case: Case) -> tuple[AttachedRegularizer, str]:
    """Attach, following what a refusal says, and check that the right layer was taken."""
    result = "works"
    try:
        reg = attach(model)
    except ClassifierNotFoundError as error:
        names = NAMED.findall(str(error))
        if names and names[0] != "path.of.the.layer":
            reg, result = attach(model, classifier=names[0]), "works, named as it says"
        elif "example=" in str(error):
            try:
                reg, result = attach(model, example=inputs), "works with `example=`"
            except ClassifierNotFoundError:  # Several are as good: one has to be named.
                reg, result = attach(model, classifier=case.path), "works, named"
        else:
            raise
    require(case.path in ("", reg.classifier_path), f"{reg.classifier_path}, not {case.path}")
    return reg, result


def check_refusal(model: nn.Module, inputs: Any, case: Case) -> None:
    """Check that nothing is taken, with `example=` neither, and that the message helps."""
    for options in ({}, {"example": inputs}):
        try:
            attach(model, **options)
        except ClassifierNotFoundError as error:
            require(case.refused in str(error), f"the message lacks {case.refused!r}: {error}")
            for name in NAMED.findall(str(error)):
                require(name == "path.of.the.layer", f"the message says to take {name}")
        except ValueError as error:  # The example led to nothing like logits.
            require("example must lead to logits" in str(error), str(error))
        else:
            raise AssertionError(f"{case.model} must be refused")


def check_tap(
    model: nn.Module, reg: AttachedRegularizer, inputs: Any, logits: Tensor
) -> tuple[Tensor, str]:
    """Check that the features are what the logits are made of; say where they were taken."""
    classifier = model.get_submodule(reg.classifier_path)
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    rates = [dropout.p for dropout in dropouts]
    dropped: list[tuple[Tensor, int, str]] = []
    handles = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        dropped.append((output, output._version, type(module).__name__))

    # As in evaluation, but the tap listens. A dropout in front of the classifier drops nothing and
    # shows by its output; at p = 0 it would hand on its very input.
    model.eval()
    classifier.train()
    for dropout in dropouts:
        dropout.train()
        dropout.p = 1e-9
        handles.append(dropout.register_forward_hook(note))
    call(model, inputs)
    features = reg.features
    for dropout, rate in zip(dropouts, rates, strict=True):
        dropout.p = rate
    for handle in handles:
        handle.remove()
    reg.discard()

    read = as_read(features, classifier)
    # One that an activation has changed in place since does not feed the classifier itself.
    before = [(o, name) for o, v, name in dropped if o._version == v and same(o, read)]
    taken = f"before {before[-1][1]}" if before else "classifier input"
    for output, name in before:
        require(output.data_ptr() != features.data_ptr(), f"the features are from after {name}")
    model.eval()
    with torch.no_grad():
        answer = classifier(read)
    answer = answer.movedim(-1, 1) if read is not features else answer
    require(is_logits(answer, logits), "the features do not give the logits")
    return features, taken


def as_read(features: Tensor, classifier: nn.Module) -> Tensor:
    """Move the channels to where a Linear reads them."""
    return features.movedim(1, -1) if isinstance(base_of(classifier), nn.Linear) else features


def is_logits(answer: Tensor, logits: Tensor) -> bool:
    """Return whether logits are the answer of a classifier, resized."""
    size = logits.shape[2:]
    if answer.ndim < logits.ndim:  # Tokens, of a square here.
        answer = answer.unflatten(2, (round(answer.shape[2] ** 0.5), -1))
    answer = answer[: len(logits)]
    mode = ("linear", "bilinear", "trilinear")[answer.ndim - 3]
    resized = [F.interpolate(answer, size, mode=mode, align_corners=a) for a in (False, True)]
    return any(float((r - logits).norm()) <= 1e-3 * float(logits.norm()) for r in resized)


def check_step(model: nn.Module, reg: AttachedRegularizer, inputs: Any, case: Case) -> None:
    """Check where the gradient of each term goes, and take a training step."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.add_param_group(reg.param_group())
    logits = case.logits(call(model, inputs))
    size = logits.shape[2:] if case.inputs else (case.size, case.size)
    labels = torch.randint(0, CLASSES, (len(logits), *size))
    terms = reg.terms(torch.cat([labels] * case.answers))
    # Of several, since one may have none: that of LoRA begins at 0.
    first = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2][:4]
    for name, term in terms._asdict().items():
        grads = torch.autograd.grad(term, first, retain_graph=True, allow_unused=True)
        reached = any(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)
        require(reached == (name != "pull"), f"{name} reaching the encoder is {reached}")
    mode = ("linear", "bilinear", "trilinear")[logits.ndim - 3]
    resized = F.interpolate(logits, size, mode=mode)
    centroids = reg.regularizer.centroids.detach().clone()
    (F.cross_entropy(resized, labels) + reg.total(terms)).backward()
    optimizer.step()
    finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    require(finite, "a step left a parameter that is not finite")
    require(not torch.equal(centroids, reg.regularizer.centroids), "the centroids did not move")


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def evaluate(model: nn.Module, inputs: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return case.logits(call(model.eval(), inputs))


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise AssertionError(claim)


def read_rows() -> list[Row]:
    return [Row(**json.loads(line)) for line in ROWS.read_text().splitlines()]


def keep(library: str, rows: Iterable[Row]) -> None:
    """Put the rows of a library in the place of those that it had."""
    others = [row for row in read_rows() if row.library != library]
    every = sorted([*others, *rows], key=lambda row: row.library)
    ROWS.write_text("".join(json.dumps(asdict(row)) + "\n" for row in every))


def render() -> None:
    """Write the page from the rows of every library."""
    rows = read_rows()
    refused = sum(row.result == "refused" for row in rows)
    told = sum(row.result not in ("works", "refused") for row in rows)
    libraries = dict.fromkeys(row.library for row in rows)
    lines = [
        "# Support matrix",
        "",
        "Written by `python benchmarks/support_matrix.py`, which builds each model from its",
        "configuration with random weights, attaches, takes one training step and checks: nothing",
        "of the model changes; the tapped features give the model's own logits; align and classify",
        "reach the encoder, and pull does not. `example=` finds the same layer. The encoders are",
        "built small, and where the classifier is as wide as the encoder, so is D.",
        "",
        f"{len(rows)} models of {len(libraries)} libraries: {len(rows) - refused} work, {told} of "
        f"them as the refusal of a bare `attach(model)` says to write; {refused} have no pixel "
        "classifier and are refused with what to do; none is picked wrong.",
        "",
        "- **classifier**: the path that is taken, `reg.classifier_path`. **kernel**: its size.",
        "  **D**: how many features it reads. **stride**: sides of the image to those of its map.",
        "- **tap**: where features are taken, at the classifier's input or before a dropout there.",
        "- **result**: *works* with a bare `attach(model)`; *with `example=`* or *named* with what",
        "  the error of a bare one says to add; *refused* with what to do instead.",
        "- **note**: the wrapper that a library needs, a recipe, or what is peculiar.",
    ]
    for library in libraries:
        mine = [row for row in rows if row.library == library]
        lines += ["", f"## {library} {mine[0].version}", ""]
        lines += ["| model | classifier | kernel | D | stride | tap | result | note |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in mine:
            cells = (
                row.model,
                f"`{row.path}`" if row.path else "",
                row.kernel,
                row.dim,
                row.stride,
                row.tap,
                row.result,
                row.note,
            )
            lines.append("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what mvsc.attach supports.")
    parser.add_argument("libraries", nargs="*", help="all that are installed by default")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    arguments = parser.parse_args()
    for library in [] if arguments.render else arguments.libraries or LIBRARIES:
        with suppress(PackageNotFoundError):
            release = version(library)
            rows = []
            for case in LIBRARIES[library]():
                rows.append(examine(library, release, case))
                print(library, case.model, rows[-1].result, rows[-1].path, flush=True)
            keep(library, rows)
    render()


if __name__ == "__main__":
    main()
