"""Training loops of other libraries, in one process: each ends where the plain loop does."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import mvsc
from tiny_nets import CLASSES, Net

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
EPOCHS = 2

pytestmark = pytest.mark.filterwarnings("ignore")


class Made:
    """A model, a regularizer and batches, equal each time."""

    def __init__(self):
        torch.manual_seed(0)
        self.images, self.labels = torch.randn(8, 3, 8, 8), torch.randint(0, CLASSES, (8, 8, 8))
        self.batches = DataLoader(TensorDataset(self.images, self.labels), batch_size=2)
        self.model = Net()
        self.reg = mvsc.attach(self.model, classifier="classifier", optimizer="own")

    def loss(self, logits, labels):
        own = F.cross_entropy(logits, labels)
        return own + self.reg(labels) if self.model.training else own


def plain_loop(made):
    optimizer = ADAMW(made.model.parameters())
    for _ in range(EPOCHS):
        for images, labels in made.batches:
            optimizer.zero_grad()
            made.loss(made.model(images), labels).backward()
            optimizer.step()


def fastai(made):
    vision = pytest.importorskip("fastai.vision.all")
    optimizer = partial(vision.OptimWrapper, opt=torch.optim.AdamW)
    loaders = vision.DataLoaders(made.batches, made.batches)
    learner = vision.Learner(loaders, made.model, loss_func=made.loss, opt_func=optimizer)
    with learner.no_bar(), learner.no_logging():
        learner.fit(EPOCHS, lr=1e-2, wd=1e-2)  # torch's weight decay


def ignite(made):
    engine = pytest.importorskip("ignite.engine")
    optimizer = ADAMW(made.model.parameters())
    trainer = engine.create_supervised_trainer(made.model, optimizer, made.loss)
    trainer.run(made.batches, max_epochs=EPOCHS)


def skorch(made):
    class Trained(pytest.importorskip("skorch").NeuralNet):
        def get_loss(self, logits, labels, *args, **options):
            return made.loss(logits, labels)

    settings = {"criterion": torch.nn.CrossEntropyLoss, "optimizer": torch.optim.AdamW, "lr": 1e-2}
    settings |= {"max_epochs": EPOCHS, "batch_size": 2, "train_split": None, "verbose": 0}
    Trained(made.model, **settings).fit(made.images.numpy(), made.labels.numpy())


def poutyne(made):
    wrapped = pytest.importorskip("poutyne").Model(
        made.model, ADAMW(made.model.parameters()), made.loss
    )
    wrapped.fit_generator(made.batches, made.batches, epochs=EPOCHS, verbose=False)


@pytest.mark.parametrize("loop", [fastai, ignite, skorch, poutyne])
def test_a_loop_of_another_library_ends_where_the_plain_one_does(loop):
    made, expected = Made(), Made()
    before = made.reg.regularizer.centroids.clone()
    loop(made)
    plain_loop(expected)
    assert not torch.equal(made.reg.regularizer.centroids, before)
    for part in ("model", "reg"):
        pair = [getattr(each, part).state_dict() for each in (made, expected)]
        assert_close(*pair, rtol=0, atol=0)
