"""Deferred logits: what leaves them deferred has the numbers of the logits, and everything else computes them."""

import pytest
import torch
from torch.nn import functional as F

from trainwright.linear_loss.deferred import DeferredLogits, Watcher
from trainwright.linear_loss.function import Term

BATCH, LENGTH, WIDTH, CLASSES = 2, 5, 4, 11


class Recorder(Watcher):
    def __init__(self):
        self.operations, self.losses = [], 0

    def needs_logits(self, operation):
        self.operations.append(operation)

    def before_loss(self, logits, targets, **settings):
        self.losses += 1


@pytest.fixture
def parts():
    torch.manual_seed(0)
    hidden, weight = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(CLASSES, WIDTH)
    return hidden.requires_grad_(), weight.requires_grad_()


def deferred(parts, watcher=None, bias=None):
    return DeferredLogits([Term(*parts)], bias, watcher=watcher)


LABELS = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
BIAS = torch.linspace(-1, 1, CLASSES)
CHANGES = {
    "view": lambda logits: logits.view(-1, CLASSES),
    "view of the last": lambda logits: logits.view(BATCH * LENGTH, -1),
    "view by a size": lambda logits: logits.view(-1, logits.size(-1)),
    "reshape": lambda logits: torch.reshape(logits, (-1, CLASSES)),
    "flatten": lambda logits: logits.flatten(0, 1),
    "without the last": lambda logits: logits[..., :-1, :].contiguous(),
    "a row": lambda logits: logits[1],
    "from the second": lambda logits: logits[:, 1:],
    "of labelled rows": lambda logits: logits[LABELS > 4],
    "scaled": lambda logits: logits * 0.25,
    "divided": lambda logits: logits / 8.0,
    "scaled from the left": lambda logits: 0.25 * logits,
    "capped": lambda logits: torch.tanh(logits / 2.0) * 2.0,
    "with a bias": lambda logits: logits + BIAS[None],
    "in doubles": lambda logits: logits.to(torch.float64),
    "where it is": lambda logits: logits.to(LABELS.device).float(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_loss_does_to_logits_leaves_them_deferred_with_the_same_numbers(parts, name):
    watcher, change = Recorder(), CHANGES[name]
    result, expected = change(deferred(parts, watcher)), change(F.linear(*parts))
    assert type(result) is DeferredLogits and not watcher.operations
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.allclose(result.materialized(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "compute"),
    [
        ("softmax", lambda logits: logits.softmax(-1)),
        ("argmax", lambda logits: logits.argmax(-1)),
        ("getitem", lambda logits: logits[..., :3]),
        ("view", lambda logits: logits.view(BATCH, -1)),
        ("mul", lambda logits: logits * torch.ones(BATCH, 1, 1)),
        ("add", lambda logits: logits + torch.zeros(CLASSES, requires_grad=True)),
        ("cat", lambda logits: torch.cat([logits, logits], 1)),
    ],
)
def test_every_other_operation_computes_the_logits_and_is_named(parts, operation, compute):
    watcher = Recorder()
    result, expected = compute(deferred(parts, watcher)), compute(F.linear(*parts))
    assert type(result) is torch.Tensor and torch.allclose(result, expected)
    assert set(watcher.operations) == {operation}


def test_what_is_written_into_logits_is_read_from_them_later(parts):
    logits, expected = deferred([one.detach() for one in parts]), F.linear(*parts).detach()
    for one in (logits, expected):
        one[:, :, 3] = float("-inf")
    flat = logits.view(-1, CLASSES)
    assert torch.equal(flat, expected.view(-1, CLASSES))


@pytest.mark.parametrize("ask", ["cross_entropy", "CrossEntropyLoss"])
def test_their_cross_entropy_is_computed_without_them(parts, ask):
    watcher = Recorder()
    function = F.cross_entropy if ask == "cross_entropy" else torch.nn.CrossEntropyLoss()
    ours = function(deferred(parts, watcher).view(-1, CLASSES), LABELS.view(-1))
    theirs = function(F.linear(*parts).view(-1, CLASSES), LABELS.view(-1))
    assert watcher.losses == 1 and not watcher.operations
    assert torch.allclose(ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, parts), torch.autograd.grad(theirs, parts)):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{"weight": torch.ones(CLASSES)}, {"reduction": "none"}], ids=["weights of classes", "no reduction"]
)
def test_a_cross_entropy_of_another_kind_is_computed_from_them(parts, settings):
    watcher = Recorder()
    ours = F.cross_entropy(deferred(parts, watcher).flatten(0, 1), LABELS.flatten(), **settings)
    assert watcher.operations == ["cross_entropy"]
    assert torch.allclose(ours, F.cross_entropy(F.linear(*parts).flatten(0, 1), LABELS.flatten(), **settings))


def test_chunks_are_the_logits_of_the_rows_of_a_mask_in_order(parts, monkeypatch):
    from trainwright.linear_loss import function

    monkeypatch.setattr(function, "FEWEST_ROWS", 3)
    monkeypatch.setattr(function, "CHUNK_BYTES", 1)
    mask = LABELS > 2
    chunks = [*deferred(parts, bias=BIAS).of_rows(mask).chunks()]
    assert len(chunks) > 1 and all(len(chunk) <= 3 for chunk in chunks)
    assert torch.allclose(torch.cat(chunks), (F.linear(*parts) + BIAS)[mask], atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@torch.no_grad()
def test_the_loss_of_each_row_is_known_after_a_loss_without_gradients(parts, smoothing):
    logits, labels = deferred(parts, bias=BIAS), LABELS.where(LABELS > 2, -100)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    mask = labels != -100
    expected = F.cross_entropy((F.linear(*parts) + BIAS)[mask], labels[mask], reduction="none")
    assert torch.allclose(logits.of_rows(mask).losses(labels[mask]), expected, atol=1e-6)


OTHERS = {
    "another row": lambda logits, mask, targets: (logits.of_rows(mask.roll(1, 0)), targets),
    "another label": lambda logits, mask, targets: (logits.of_rows(mask), targets.flip(0)),
    "fewer rows": lambda logits, mask, targets: (logits[:1].of_rows(mask[:1]), targets[: mask[0].sum()]),
    "scaled": lambda logits, mask, targets: ((logits * 2.0).of_rows(mask), targets),
    "capped": lambda logits, mask, targets: (torch.tanh(logits).of_rows(mask), targets),
    "with a bias": lambda logits, mask, targets: ((logits + BIAS).of_rows(mask), targets),
    "with another bias": lambda logits, mask, targets: (logits.changed(bias=BIAS.clone()).of_rows(mask), targets),
    "rounded": lambda logits, mask, targets: (logits.to(torch.float16).of_rows(mask), targets),
    "with an adapter": lambda logits, mask, targets: ((logits + deferred(terms_of(logits))).of_rows(mask), targets),
}


def terms_of(logits):
    return logits.terms[0].hidden, logits.terms[0].weight


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_the_loss_of_another_row_label_or_head_is_not_known(parts, name):
    logits, mask = deferred(parts), LABELS > 2
    assert mask.sum() == mask.roll(1, 0).sum() and not torch.equal(mask, mask.roll(1, 0))
    F.cross_entropy(logits.flatten(0, 1), LABELS.where(mask, -100).flatten())
    rows, targets = OTHERS[name](logits, mask, LABELS[mask])
    assert rows.losses(targets) is None
    assert logits.of_rows(mask).losses(LABELS[mask]) is not None


def test_a_loss_with_gradients_keeps_those_of_no_row(parts):
    logits = deferred(parts)
    F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
    assert logits.known == []


def test_the_sum_of_a_head_and_its_adapter_stays_deferred(parts):
    adapter = torch.randn(BATCH, LENGTH, 2), torch.randn(CLASSES, 2)
    logits = deferred(parts) + DeferredLogits([Term(*adapter)]) * 0.5
    assert type(logits) is DeferredLogits
    assert torch.allclose(logits.materialized(), F.linear(*parts) + F.linear(*adapter) * 0.5, atol=1e-5)
