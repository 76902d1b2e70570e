"""Plant realistic bugs, one at a time, and see whether the tests notice.

    python tests/mutations.py            # all, a quarter of an hour on 2 cores
    python tests/mutations.py 3 17       # some, by number

Works on a copy in a temporary folder. Prints a table. The file of tests
that stands beside the file with the bug is run first, and the first failure ends the run. Each
run is a fork of this process, which has imported torch already; so it needs a POSIX system.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import hypothesis  # noqa: F401  (imported once, before the forks)
import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = (
    "equations",
    "sampling",
    "kernel",
    "checks",
    "labels",
    "classifier",
    "watch",
    "stepping",
    "regularizer",
    "state",
    "tap",
    "finding",
    "attach",
    "distributed",
    "attach_distributed",
    "shapes",
)
FIRST = {
    "hosts": "finding",
    "comparing": "finding",
    "add_to_loss": "attach",
    "integrations/transformers": "integrations",
}
"""Where the tests of a file without one of its own name are."""

SEVERAL = ("process", "shard", "of the world", "sync_means", "group is forgotten")
"""What the bugs are about that only the tests with several processes can notice."""

TIME_LIMIT = 600

# What a hurried or well-meaning hand would write: file, line, line after, and what it means.
BUGS = [
    ("equations", "centroids + (means - means.detach())", "(centroids + means) - means.detach()", "straight-through in the wrong order"),
    ("equations", "centroids + (means - means.detach())", "centroids", "Eq. 4 dropped"),
    ("equations", "torch.where(present, classes, _ABSENT).flatten()", "classes.expand_as(present).flatten()", "averaged over absent cells too"),
    ("equations", "torch.where(present.any(dim=0), cosines / temperature, lowest)", "cosines / temperature", "absent classes are negatives"),
    ("equations", "lowest = torch.finfo(cosines.dtype).min", "lowest = -torch.inf", "masked with minus infinity"),
    ("equations", "return total / count.clamp_min(1)", "return total / count", "nothing present divides by zero"),
    ("equations", "return total / count.clamp_min(1)", "return total", "sum for mean"),
    ("equations", "units.view_as(means) @", "means @", "means of any length in Eq. 2"),
    ("equations", "return centroids[:0].sum()", "return 0 * centroids.sum()", "zero by a product"),
    ("equations", "return centroids[:0].sum()", "return centroids.new_zeros(())", "zero without a graph"),
    ("equations", "if weight > 0:", "if True:", "a term of weight 0 is added"),
    ("equations", "add(EPS**2)", "add(EPS)", "epsilon not squared"),
    ("equations", ".add(EPS**2).rsqrt()", ".rsqrt()", "NaN at a zero vector"),
    ("sampling", "    first = groups // 2\n", "    first = groups - groups // 2\n", "odd groups split the wrong way"),
    ("sampling", "    return weights.index_select(1, draw_order(groups, step, seed))", "    return weights.clone()", "halves never redrawn"),
    ("equations", "torch.rsub(half_a.dot(half_b), 1, alpha=1 / num_classes)", "1 + half_a.dot(half_b) / num_classes", "sign of Eq. 3"),
    ("equations", "sums / counts.clamp_min(1).unsqueeze(-1)", "sums / counts.unsqueeze(-1)", "an empty cell divides by zero"),
    ("kernel", "dtype = features.shape[1], _sum_dtype(features)", "dtype = features.shape[1], features.dtype", "half accumulation"),
    ("kernel", "            total = sums if total is None else total.add_(sums)\n            sums,", "            sums,", "a block is lost"),
    ("kernel", "if added + len(index) > _LONGEST_SUM:", "if False:", "one long float32 sum"),
    ("kernel", "return _Spread.apply(grad, cells, ctx.dtype, ctx.channels_last), None, None", "return _Spread.apply(grad, cells, ctx.dtype, False), None, None", "gradient in another layout"),
    ("kernel", "ctx.save_for_backward(cells)\n        ctx.dtype, ctx.channels_last", "ctx.save_for_backward(cells)\n        ctx.kept = features.float()\n        ctx.dtype, ctx.channels_last", "a float32 copy of the features is kept"),
    ("sampling", "    labels = labels.long()  # Before any", "    labels = labels  # Before any", "uint8 comparison"),
    ("sampling", "(2 * torch.arange(places, device=device) + 1) * others", "(2 * torch.arange(places, device=device)) * others", "labels taken at the corner"),
    ("sampling", "    if 0 <= ignore_index < num_classes:\n", "    if False:\n", "ignored pixels counted"),
    ("sampling", "labels.clamp(-1, num_classes).remainder(num_classes + 1)", "labels.clamp_max(num_classes)", "negative labels leak into another group"),
    ("sampling", "value=groups * num_classes).flatten()", "value=groups * num_classes - 1).flatten()", "ignored pixels leak into a cell"),
    ("sampling", "_kept(_counted, labels, pixels).add(first_group)", "_kept(_counted, labels, pixels).add(0)", "the first group is not drawn for each class"),
    ("sampling", "first_group = numbers[pixels:].index", "first_group = (_mixed_numbers(pixels + num_classes + 1, 0, flat.device) >> 32)[pixels:].index", "the first group is the same each step"),
    ("sampling", "order = numbers[:pixels].add(", "order = (_mixed_numbers(pixels, 0, flat.device) >> 33).add(", "the split is the same each step"),
    ("sampling", "order = numbers[:pixels].add(", "order = torch.randint_like(flat, 2**31).add(", "global random numbers"),
    ("sampling", "_mix(_mix(seed) ^ rank) ^ stream", "_mix(_mix(seed)) ^ stream", "every process splits alike"),
    ("sampling", "(numbers ^ (step * _signed(_GOLDEN)))", "(numbers ^ ((step & 0xFFFFFFFF) * _signed(_GOLDEN)))", "steps repeat after 2^32"),
    ("regularizer", "        elif not is_replaying():", "        else:", "a checkpointed backward draws anew"),
    ("regularizer", "        if not self.training:\n            if watched", "        if False:\n            if watched", "evaluation counts as a step"),
    ("regularizer", "        features, labels, axes = self._check(features, labels, classifier, grid, channels_last)\n        self._advance(classifier, learns=bool(wanted))", "        self._advance(classifier, learns=bool(wanted))\n        features, labels, axes = self._check(features, labels, classifier, grid, channels_last)", "a failed call counts as a step"),
    ("regularizer", "drawn.normal_(std=(2 / self.dim) ** 0.5, generator=generator)", "drawn.normal_(std=(2 / self.dim) ** 0.5)", "initial centroids from the global generator"),
    ("regularizer", "self.centroids.data = kept.to(moved.device)", "self.centroids.data = moved.float()", "centroids rounded by half()"),
    ("regularizer", "with _without_autocast(features.device.type):", "if True:", "autocast inside"),
    ("regularizer", '"weight_decay": 0.0, ', "", "centroids decay"),
    ("regularizer", "self.invalid_count += bad.sum()", "pass", "labels out of range are not counted"),
    ("regularizer", "self.invalid_count += bad.sum()", "self.invalid_count += int(bad.sum())", "a host sync in each step"),
    ("classifier", "else weight.flatten(2).sum(dim=2)", "else weight.flatten(2)[:, :, weight[0, 0].numel() // 2]", "centre tap of a k x k classifier"),
    ("classifier", 'distributed.gather(parameter) if hasattr(parameter, "full_tensor") else parameter', "parameter", "weights of a sharded classifier used raw"),
    ("classifier", "and matrix and not _gathers_by_itself(classifier)", "and matrix", "weights of a sharded classifier used raw"),
    ("regularizer", 'if self.sync == "auto" and self._stepper is None:', "if False:", "gradients of the centroids differ by process"),
    ("regularizer", "halves = draw_halves(self.groups, self.step, self.seed, centroids.dtype)", "halves = draw_halves(self.groups, self.step, self.seed + distributed.rank(self.process_group), centroids.dtype)", "halves differ by process"),
    ("regularizer", "if self.enhance else centroids", "if True else centroids", "enhance=False ignored"),
    ("regularizer", "dim, dtype=torch.float32)", "dim)", "centroids in the default dtype"),
    ("regularizer", "persistent=False", "persistent=True", "a new key in the state"),
    ("classifier", "inputs = vectors.to(dtypes[0] if dtypes else vectors.dtype)", "inputs = vectors", "V' not cast for a half-precision classifier"),
    ("watch", "            if torch.equal(self.values_seen, _shard_of(centroids))", "            if False:", "forgotten centroids go unnoticed"),
    ("distributed", "_all_reduce(grad, ctx.group) / dist.get_world_size(ctx.group), None", "_all_reduce(grad, ctx.group), None", "sum for mean over processes"),
    ("distributed", "        return _all_reduce(grad, ctx.group), None", "        return grad, None", "the encoder's gradient shrinks by the number of processes"),
    ("labels", "labels = labels.long()  # Before", "labels = labels  # Before", "uint8 comparison in the check"),
    ("regularizer", "            counts = distributed.sum_over_processes(counts, self.process_group)\n", "", "sync_means: own counts under the sums of all"),
    ("regularizer", "        self._advance(classifier, learns=bool(wanted))\n        ask", "        self._advance(classifier, learns=bool(wanted))\n        self._last = features\n        ask", "the features are kept on the module"),
    ("regularizer", "rank = distributed.rank(self.process_group)", "rank = distributed.rank()", "the rank is that of the world, not of the group"),
    ("distributed", "dist.all_reduce(total, group=group)", "dist.all_reduce(total)", "the group is forgotten"),
    ("stepping", "taken is not None and len(host.param_groups) == 1 and", "False and", "the rate of the first group, where a host steps one at a time"),
    ("stepping", "which not in taken.rates:", "True:", "a second step of the host is taken along"),
    ("stepping", "            self.taken = None\n            self.zero", "            self.zero", "a step is taken again a step of the host later"),
    ("stepping", "            self.zero.grad = None  # A loss", "            pass  # A loss", "steps without MVSC count in the mean"),
    ("stepping", "value.copy_(torch.where(finite, value, old))", "pass", "momentum moves the centroids in a step that overflowed"),
    ("stepping", "    _here.stepping = True\n", "    pass\n", "what wraps an optimizer steps for ever"),
    ("stepping", "centroids.copy_(taken.centroids)", "pass", "a step that is taken again begins where it ended"),
    ("stepping", "optimizer.load_state_dict(copy.deepcopy(taken.optimizer))", "pass", "a step that is taken again counts twice in the moments"),
    ("stepping", 'return {**self.__dict__, "taken": None, "classifier": None}', "return self.__dict__", "a copy carries the model's optimizer"),
    ("stepping", "mean = (sums[:-1] / sums[-1]).view_as(grad)", "mean = sums[:-1].view_as(grad)", "a loss scale reaches the centroids"),
    ("stepping", "return torch.where(finite, mean, 0.0), finite", "return mean, finite", "an overflow reaches the centroids"),
    ("stepping", "count = torch.zeros((), dtype=torch.float32)", "count = torch.ones((), dtype=torch.float32)", "AdamW begins at its second step"),
    ("stepping", "if centroids.grad is not None:", "if True:", "a step without a backward"),
    ("tap", '        options["channels_last"] = is_channels_last(classifier, features.shape, width)\n', '        options["channels_last"] = False\n', "channels of a Linear's input taken for rows"),
    ("attach", "            if same and not torch.allclose(", "            if False and not torch.allclose(", "a hook that changes the answer goes unnoticed"),
    ("attach", "        len(parts) == 2\n", "        False\n", "LoRA of two layers goes unnoticed"),
    ("tap", "            if other.replaced():", "            if False:", "hooks of a classifier that was replaced stay"),
    ("add_to_loss", "            if self.tap.replaced():", "            if False:", "MVSC stops in silence where the classifier was replaced"),
    ("add_to_loss", "        if taps_on(module):", "        if False:", "a copy that is attached is said to add nothing"),
    ("watch", "        if _are_turned(features, labels):", "        if False:", "labels whose axes are exchanged go unnoticed"),
    ("watch", "        if not few and bool((beside < _MANY).all()):", "        if not few:", "a class that misses the grid goes unnoticed"),
    ("labels", "    either = single or axes\n", "    either = axes\n", "void pixels of one-hot labels on a square are read the other way"),
    ("tap", "        self.working = True  # The call", "        self.working = False  # The call", "the regularizer's own call of the classifier is a forward"),
    ("tap", "features.clone() if module.inplace else features", "features", "what an in-place dropout left is tapped"),
    ("tap", "                return dropped.entered\n", "                pass\n", "features from behind the dropout"),
    ("tap", "    if _version_of(other) != version:", "    if False:", "what changed a dropout's output in place is skipped"),
    ("tap", "for depth in range(len(names)):\n        for part", "for depth in range(len(names) - 1, len(names)):\n        for part", "a dropout beside the classifier alone is watched"),
    ("tap", "        self.dropped = []  # No", "        # No", "the graph of a forward without the classifier is held"),
    ("tap", "            return False  # A backward replays", "            pass  # A backward replays", "the replay of a checkpoint is a forward"),
    ("tap", "self.forwards = min(self.forwards + 1, 2)", "self.forwards = 1", "of two forwards the last is taken"),
    ("tap", "        if training and torch.is_grad_enabled():", "        if torch.is_grad_enabled():", "an evaluation is a forward"),
    ("tap", "        if not features.requires_grad:", "        if False:", "frozen features go unnoticed"),
    ("tap", "if version is not None and features._version != version:", "if False:", "a change in place goes unnoticed"),
    ("tap", "        self.clear(missing if features is None else _USED_UP)\n", "", "features stay after their loss"),
    ("tap", '    def __reduce__(self) -> tuple[type["Tap"]', '    def _reduce(self) -> tuple[type["Tap"]', "an EMA copy of the model writes into the tap"),
    ("add_to_loss", "        return _add_to(output, key, loss)", "        return output", "add_to_loss adds nothing"),
    ("add_to_loss", "        return found[0] if len(found) == 1 else None", "        return 0", "add_to_loss takes what comes first for the loss"),
    ("add_to_loss", "        same = [*own][: self.named] == [*found][: self.named]", "        same = True", "an argument behind those of a wrapper is taken for the labels"),
    ("add_to_loss", "if not classifier.training and torch", "if False and torch", "add_to_loss is silent in evaluation mode on purpose"),
    ("tap", "            self.clear(_FAILED)", "            pass", "the graph of a failed forward lives on"),
    ("tap", "gc.collect()  # A Trainer", "pass  # A Trainer", "a regularizer in cycles holds its place for ever"),
    ("attach", "_options_of_config(model, path) | options", "options | _options_of_config(model, path)", "the config beats the user's option"),
    ("attach", "regularizer.to(device)", "regularizer", "the regularizer stays on the CPU"),
    ("finding", "    if len(fit) != 1 or _classifies_queries(model, fit[0], refused):", "    if not fit:", "the first of several candidates is guessed"),
    ("comparing", "if any(_is_resized(a, b) or _padded_by(a, b) is not None for a, b in pairs):", "if pairs:", "any layer of the right shape is proven"),
    ("hosts", "if part in parts]", "if False]", "an auxiliary head may be the classifier"),
    ("finding", "            module.training = training\n", "            pass\n", "the example leaves the model in evaluation mode"),
    ("finding", "with torch.random.fork_rng(list(devices)), torch.no_grad()", "with torch.no_grad()", "the example draws from the global generator"),
    ("integrations/transformers", "            optimizer.add_param_group(reg.param_group())\n", "            pass\n", "the Trainer's optimizer does not get the centroids"),
    ("integrations/transformers", "self.reg.zero_grad()  # The", "pass  # The", "the Trainer's steps add the centroids' gradients up"),
    ("integrations/transformers", "        reg.load_state_dict(torch.load(file, weights_only=True))", "        pass", "a resumed Trainer starts with new centroids"),
    ("diagnostics", " - unit.square().sum(dim=(0, 2))", "", "a group is compared with itself"),
    ("diagnostics", "_wide(own > others)", "_wide(own >= others)", "a tie is a hit"),
    ("diagnostics", "~(in_batch & _different(present))", "~_different(present)", "absent classes compete for the accuracy"),
    ("diagnostics", "pairs = present.unsqueeze(-1) & present & _different(present)", "pairs = present.unsqueeze(-1) & present", "a class lies apart from itself"),
    ("diagnostics", "    unit = _unit(features.movedim(1, -1)).movedim(-1, 1)", "    unit = _wide(features)", "directions not scaled to length 1"),
    ("diagnostics", "older = torch.cat([ages + 1,", "older = torch.cat([ages.add_(1),", "the caller's ages change"),
    ("diagnostics", ".clamp(-1, 1)", "", "a cosine above 1"),
    ("diagnostics", "torch.where(mask, _wide(values), 0).sum()", "(mask * _wide(values)).sum()", "NaN where nothing was measured reaches the mean"),
    ("diagnostics", "return total / mask.sum()", "return total / mask.sum().clamp_min(1)", "0 for what was not measured"),
    ("diagnostics", "with torch.autocast(rows.device.type, enabled=False):", "if True:", "autocast inside the diagnostics"),
    ("diagnostics", "step=grid.new_zeros(())", "step=torch.randint_like(grid[0, 0, 0], 99)", "the diagnostics' split changes from call to call"),
    ("regularizer", "    if not is_replaying():\n        step += 1", "    step += 1", "a checkpointed backward of a compiled regularizer draws anew"),
    ("regularizer", "        return torch.promote_types(common, torch.float32)", "        return common", "centroids that come in half precision are computed with as such"),
    ("regularizer", "            if kept_grad is not None:\n", "            if False:\n", "a gradient rounded by half()"),
    ("watch", '            self.said.add("idle")\n', "", "forgotten centroids are looked for again and again"),
    ("regularizer", "            errors.append(", "            str(", "a step that lost its digits is loaded"),
    ("distributed", "    if size < 1:", "    if False:", "a process outside the group gets its gradient negated"),
    ("distributed", "if not torch.equal(_bits(copied), _bits(copies[0])):", "if not torch.equal(copied, copies[0]):", "NaN in every process is taken for drift"),
    ("distributed", '    if not hasattr(parameter, "device_mesh"):', "    if True:", "the initial centroids of a shard are those of the whole"),
    ("kernel", "            total = sums if total is None else total.add_(sums)\n    assert", "            total = sums\n    assert", "a block is lost on a GPU"),
    ("classifier", "n + s * apart * (k - 1), s * step", "n, s * step", "a k x k convolution in a Sequential sees a border of zeros"),
    ("attach", "        if name in _SETTINGS:", "        if False:", "a setting that is set in vain"),
    ("attach", "        if options.get(name, found) != found:", "        if False:", "a single logit, or other classes than the user said, are taken"),
    ("tap", "if not torch.compiler.is_compiling() and self.replaced():", "if False:", "a classifier that was replaced goes unnoticed"),
    ("classifier", "                vars(module)[name] = type(hooks)(_computing(module) if name == _HOOKS[0] else {})\n", "                pass\n", "hooks of others see the centroids"),
    ("classifier", "None if buffer is None else buffer.clone()", "buffer", "buffers of others learn from the centroids"),
    ("classifier", '{"weight", "bias"} <= layer._parameters.keys()', '{"weight"} <= layer._parameters.keys()', "a pruned bias is read stale"),
    ("classifier", "    return known if known or", "    return hooks if known or", "hooks of users on a pruned classifier see the centroids"),
    ("classifier", "stored or parametrize.is_parametrized(module)", "stored", "hooks of users on a parametrized classifier see the centroids"),
    ("classifier", "    with _LOCK:\n", "    if True:\n", "a hook on a classifier of two threads is lost"),
    ("classifier", "        dropout.training = False\n", "        pass\n", "a dropout drops parts of the centroids"),
    ("classifier", "sizes = [2 * (n + s) - 3 for", "sizes = [n for", "a stride in a Sequential sees a border of zeros"),
    ("classifier", "(size - 1) // s + 1)\n", "99 * size)\n", "an upsampled answer is taken from between two places"),
    ("classifier", "(size - n) // s + 1, ", "1, ", "a pooled answer has seen a border of zeros"),
    ("classifier", 'if end.startswith(("Softmax", "Sigmoid")):', "if False:", "probabilities of a head of one's own are taken for logits"),
    ("classifier", ' and getattr(classifier, "groups", 1) == 1', "", "weights of a grouped convolution used raw"),
    ("classifier", '    own = getattr(module, "_parameters", {}).values()', '    own = [getattr(module, "weight", None)]', "to ask for a weight is a power iteration"),
    ("classifier", "torch.cat([torch.zeros_like(logits), logits], dim=1)", "torch.cat([logits, torch.zeros_like(logits)], dim=1)", "a single logit is that of the first class"),
    ("labels", "return 255 if num_classes <= 255 else -100", "return 255", "class 255 is ignored by default"),
    ("labels", 'f"Use ({name} * 255).round().long()', 'f"Use {name}.long()', "a remedy turns scaled labels into class 0"),
    ("labels", "if not (values.min() >= 0 and values.max() <= 1)", "if values.min() < 0 or values.max() > 1", "NaN is taken for a channel for each class"),
    ("labels", 'f"For {word} use {name}.argmax({whole[0]})."', 'f"For {word} use {name}.argmax(1)."', "a remedy takes rows for classes"),
    ("watch", "labels == cropped or right is None", "right is None", "images that are padded to twice their size go unnoticed"),
    ("watch", "    if all(any(n in", "    if False and all(any(n in", "a resize of another ratio is taken for padding"),
    ("watch", '            if "kept" not in self.said and bool(centroids.grad.any()):', '            if "kept" not in self.said:', "a gradient that was set to zero is taken for a kept one"),
    ("watch", "moved = last is not None and last != centroids._version", "moved = True", "accumulation is taken for a kept gradient"),
    ("watch", "self.idle_steps, self.version_at_backward, self.values_seen = 0, None, None", "pass", "a loaded state is taken for an optimizer's step"),
    ("watch", "            if torch.equal(self.values_seen, _shard_of(centroids))", "            if True:", "a fused optimizer is taken for none"),
    ("sampling", "torch.where(label < num_classes, length, 0)", "length", "unlabelled pixels vote"),
    ("sampling", "    return torch.where(reached, winner, centres)", "    return winner", "a map finer than its labels loses pixels"),
    ("tap", '        return getattr, (nullcontext(), "__exit__")', "        return nullcontext, ()", "the hook in a copy cannot be called"),
    ("tap", "            self.seen = None  # Not a map", "            pass  # Not a map", "the features outlive the next forward's begin"),
    ("tap", "return seen.movedim(-1, 1) if last else seen", "return seen", "features of a Linear are looked at channels last"),
    ("add_to_loss", "elif output is None or labels is None:", "elif output is None and labels is None:", "a forward without labels, or one that failed, is a step"),
    ("attach", "if found is not None and (found.certain or not self.verdicts) and not named:", "if False:", "a residual head goes unnoticed"),
    ("attach", "        except RuntimeError:  # Of tensors", "        except ZeroDivisionError:  # Of tensors", "the first forward's check ends a forward"),
    ("comparing", "_readable(a[:1], b[:1]) for a, b in pairs]", "_readable(a, b) for a, b in pairs]", "the first forward's check needs the memory of a batch"),
    ("comparing", "*(n for n in _STRIDES if least < n <= 2 * least)", "", "only padding by less than a stride is found"),
    ("comparing", "    if not finite or any(", "    if any(", "logits that are not finite are doubted"),
    ("finding", '            if reason in ("", _SINGLE) and', '            if reason == "" and', "a depth head is proposed"),
    ("hosts", 'library = type(module).__module__.partition(".")[0]', 'library = "transformers"', "a model of the user's is refused as one of transformers"),
    ("integrations/transformers", "            share /= getattr(trainer,", "            getattr(trainer,", "the weight grows with the parts of an accumulated batch"),
    ("integrations/transformers", "            share /= trainer.accelerator.num_processes // copies", "            pass", "the weight grows where a Trainer multiplies its loss"),
    ("finding", "copies.get(buffer, buffer)", "buffer", "the example moves counters and observers"),
    ("comparing", "dict.fromkeys((0, n // 2, n))", "dict.fromkeys((0, n // 2))", "padding at the beginning goes unnoticed"),
    ("comparing", "logs - logs.mean(1, keepdim=True)", "logs", "padding behind a softmax goes unnoticed"),
    ("attach", "if len(self.verdicts) == _SIZES_COMPARED or", "if self.verdicts or", "padding is looked for at the first size alone"),
    ("watch", "            self.lost_in_a_row = 0\n            there", "            there", "a small map that loses labels now and then is warned of"),
    ("finding", "reader = None if path is None else _reader_behind(model, *hosts[0], path)", "reader = None", "a library's head that feeds another is taken"),
    ("finding", "own = not (inside and library) and", "own = not inside and", "a layer behind the head of a subclass is overlooked"),
    ("finding", "and not (trains and frozen)", "", "a frozen teacher is taken"),
    ("finding", "open_still = [n for n in refuted if not elsewhere[n]]", "open_still = refuted", "a layer of no segmenter is proposed behind probabilities"),
    ("classifier", "plain = type(layer) in _PIXEL_LINEAR and", "plain = False and", "a layer whose classes were cut off is taken at its word"),
    ("classifier", "not own and convolves in _CONVOLVES", "not own", "a convolution that computes its kernel is not called"),
    ("comparing", "if factor is not None and not 1 / _MUCH < factor < _MUCH:", "if False:", "logits that are multiplied go unnoticed"),
    ("comparing", "not 1 / _MUCH < factor < _MUCH", "True", "a temperature is doubted"),
    ("regularizer", "learns and torch.is_grad_enabled()  # Else", "learns  # Else", "a long validation is taken for an idle optimizer"),
    ("stepping", "self.zero = torch.zeros((), dtype=torch.float32, ", "self.zero = torch.zeros((), ", "what the loss was multiplied by is rounded"),
    ("stepping", "factor = 1.0 if rate is None or begun is None", "factor = 1.0 if begun is None", "an optimizer without a rate crashes"),
    ("labels", "if labels.shape[axis] == 3 and bool(", "if False and bool(", "a grey picture read in colour is lost"),
    ("integrations/transformers", "if groups and isinstance(centroids, nn.Parameter)", "if False and isinstance(centroids, nn.Parameter)", "a Trainer's optimizer without centroids goes unnoticed"),
    ("integrations/transformers", "if several and self._adds_up(trainer)", "if False and self._adds_up(trainer)", "means that are added up go unnoticed"),
    ("labels", "if num_classes in (None, labels.shape[axis])", "if True", "colours are taken for a channel for each class"),
    ("labels", "    if not bool(labels.any()):", "    if False:", "a batch of zeros is taken for labels that nothing has divided"),
    ("watch", "(_is_stride(unpadded) and not _is_stride(right))", "False", "labels of a square that was padded are stretched in silence"),
    ("watch", "if own and centroids.grad is None:", "if centroids.grad is None:", "gradients of the model's parameters alone go unnoticed"),
    ("regularizer", "watched = learns and torch", "watched = torch", "weights of 0 are taken for an idle optimizer"),
    ("tap", "            elif not isinstance(getattr(hook, \"__self__\", None), nullcontext):", "            else:", "a copy keeps its idle hooks"),
    ("add_to_loss", "if is_replaying():", "if False:", "a checkpoint of the whole model loses the loss"),
    ("comparing", "_MADE = ((_is_cut, _CUT), ", "_MADE = (", "a class that is cut off behind a resize goes unnoticed"),
    ("finding", "if path is None and refused is None and (sole", "if False and (sole", "example takes what is returned before the logits"),
    ("finding", "and (ran.by_name or part.shape[1] != first.shape[1])", "and part.shape[1] != first.shape[1]", "of two maps with names the first is taken for the logits"),
    ("labels", "and not (axes == 3 and shape[0] == 1)", "", "one slice of a volume is taken for all"),
    ("regularizer", "            self._watch.evaluations = 0\n", "", "a line search in evaluation mode is warned of"),
    ("regularizer", "                self._watch.notice_evaluation()\n", "                pass\n", "training in evaluation mode goes unnoticed"),
    ("stepping", "if any(stepper.thread == here for _, stepper in pairs):", "if False:", "an optimizer of another thread is followed"),
    ("stepping", "if any(stepper.thread == here for _, stepper in pairs):", "if True:", "a step in another thread than the forward goes unnoticed"),
    ("stepping", "if pair[1].is_asked_about(held)] or pairs", "] or pairs", "of two models one steps at the other's rate"),
    ("stepping", 'group["lr"] = group["lr"].clone()', "pass", "a rate that the user keeps in a tensor is set"),
    ("stepping", "in (None, here)", "in (here,)", "a compiled regularizer is not followed beside an eager one"),
    ("regularizer", "                self.step -= 1\n", "                pass\n", "a call that is refused is a step"),
    ("regularizer", "self.__getstate__()  #", "self.__dict__  #", "a copy of a compiled one trains the original"),
    ("regularizer", "elif moments or (centroids is not None and step is not None):", "else:", "a part of a state forgets the moments"),
    ("comparing", "(_is_folded, _FOLDED), ", "", "several values of a class that become one go unnoticed"),
    ("comparing", "for whole in (answer, *wholes):", "for whole in (answer,):", "values that are folded behind a resize go unnoticed"),
    ("comparing", "if each.ndim == 3 < answer.ndim:", "if False:", "rows behind an upsampling are doubted"),
    ("comparing", "any(float((each.argmax(1) == best)", "all(float((each.argmax(1) == best)", "an activation behind an upsampling is doubted"),
    ("classifier", "if whole or isinstance(error, torch.OutOfMemoryError):", "if whole:", "memory that runs out is taken for a wrong classifier"),
    ("classifier", "other = inputs.flatten(2)[..., 0] if maps else", "other = inputs if maps else", "a head of rows is asked about maps only"),
    ("classifier", "if 0 < left < features.shape[axis + 2]:", "if False:", "labels are stretched over the margin of a convolution without padding"),
    ("regularizer", "if read and tokens:", "if False:", "one-hot labels of tokens are read as a map"),
    ("comparing", "return _of_other_classes(answer, output)", "return None", "an embedding is not doubted"),
    ("finding", "model.train(modes[model])", "modes[model]", "what train() computes is not undone after an example"),
    ("tap", "shape != self.shape", "False", "classes that are added in place go unnoticed"),
    ("add_to_loss", "if self.tap.missing == NO_FORWARD and", "if False and", "a step of another head ends the training"),
    ("attach", "if trained and (low_rank or not parts):", "if trained and False:", "LoRA around a frozen classifier goes unnoticed"),
]  # fmt: skip


class FirstFailure:
    """A plugin for pytest: what failed first, and nothing of what pytest has to say."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.name is None:
            self.name = report.nodeid.split("::", 1)[-1].split("[")[0]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.name is None:
            self.name = "the import"


def main() -> None:
    chosen = [int(each) for each in sys.argv[1:]] or range(len(BUGS))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for each in ("mvsc", "tests", "examples", "benchmarks", "docs"):
            shutil.copytree(ROOT / each, copy / each, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        first = dict.fromkeys(most_likely(*BUGS[number]) for number in chosen)
        if (noticed := noticed_by(copy, *first)) is not None:
            sys.exit(f"The tests fail without any bug: {noticed}")
        print("| # | file | bug | noticed by |\n| --- | --- | --- | --- |", flush=True)
        for number in chosen:
            name, line, wrong, meaning = BUGS[number]
            path = copy / "mvsc" / f"{name}.py"
            source = path.read_text("utf-8")
            if line not in source:
                sys.exit(f"Bug {number} has no place any more: {line!r} is not in {name}.py.")
            path.write_text(source.replace(line, wrong, 1), "utf-8")
            noticed = noticed_by(copy, most_likely(*BUGS[number]))
            path.write_text(source, "utf-8")
            test = f"`{noticed}`" if noticed else "**nothing**"
            print(f"| {number} | {name}.py | {meaning} | {test} |", flush=True)


def most_likely(name: str, line: str, wrong: str, meaning: str) -> str:
    """Return the file of tests that should notice a bug."""
    if any(each in meaning for each in SEVERAL):
        return "distributed"
    return FIRST.get(name, name)


def noticed_by(copy: Path, *first: str) -> str | None:
    """Run the tests on the copy, some files before the others; return what fails."""
    others = [name for name in TESTS if name not in first]
    return run_tests(copy, list(first)) or run_tests(copy, others)


def run_tests(copy: Path, names: list[str]) -> str | None:
    files = [f"tests/test_{name}.py" for name in names]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    run = multiprocessing.get_context("fork").Process(target=tests, args=(copy, files, sender))
    run.start()
    sender.close()
    run.join(TIME_LIMIT)
    if run.is_alive():
        run.kill()
        return "a hang"
    try:
        noticed: str | None = receiver.recv()
    except EOFError:
        return "a crash"
    return noticed


def tests(copy: Path, files: list[str], result: Connection) -> None:
    """Run the tests in this process, in silence, and send what failed first."""
    with open(os.devnull, "w") as silence:  # noqa: PTH123
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[0] = str(copy)
    failure = FirstFailure()
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile", "no shrinking"]
    # hypothesis has been imported before pytest could rewrite its assertions.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *files], plugins=[failure])
    result.send(failure.name or (None if code == 0 else "a crash"))


if __name__ == "__main__":
    main()
