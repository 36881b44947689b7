"""The comparison with the model's own loss, before the first update.

Owns: comparing loss and gradients of some rows. Leaves to others: what follows from a difference (`heads`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainwright.linear_loss.deferred import DeferredLogits
from trainwright.linear_loss.function import Term, cross_entropy_of

MOST_ROWS = 32  # whose logits are computed
# Of loss and of the norm of a gradient. Only the order of sums differs; in half precision they are rounded again.
LARGEST_DIFFERENCE, LARGEST_DIFFERENCE_IN_HALF = 1e-3, 0.05


def difference_from_logits(logits: DeferredLogits, targets: torch.Tensor, **settings: Any) -> str | None:
    """How the loss of `logits`, (rows, classes), or one of its gradients differs from that computed from all logits, on
    the first rows that have a label; None where they do not. `settings`: of `cross_entropy_of`.
    """
    rows = (targets != settings["ignore_index"]).nonzero().squeeze(1)[:MOST_ROWS]
    targets = targets[rows]
    with torch.enable_grad():
        terms = [Term(hidden.detach()[rows], weight.detach()) for hidden, weight in logits.terms]
        bias = None if logits.bias is None else logits.bias.detach()
        asked = [[term.hidden for term in terms], [], []]
        pairs = zip(terms, logits.terms)
        asked[1] = [mine.weight for mine, theirs in pairs if theirs.weight.requires_grad]
        if bias is not None and logits.bias is not None and logits.bias.requires_grad:
            asked[2] = [bias]
        inputs = [one.requires_grad_() for group in asked for one in group]
        real = logits.changed(terms=terms, bias=bias).real()
        names = ("ignore_index", "reduction", "label_smoothing")
        ours = cross_entropy_of(terms, targets, bias, **settings)
        of_ours = torch.autograd.grad(ours, inputs)
        theirs = F.cross_entropy(real, targets, **{name: settings[name] for name in names})
        of_theirs = torch.autograd.grad(theirs, inputs)
    is_half = real.dtype.itemsize < 4 or settings["dtype"].itemsize < 4
    bound = LARGEST_DIFFERENCE_IN_HALF if is_half else LARGEST_DIFFERENCE
    what = [
        "loss",
        *["gradient of the hidden states"] * len(terms),
        *["gradient of the weight"] * len(asked[1]),
        "gradient of the bias",
    ]
    for name, one, other in zip(what, (ours.detach(), *of_ours), (theirs.detach(), *of_theirs)):
        difference = torch.linalg.vector_norm(one.float() - other.float())
        if not bool(difference <= bound * torch.linalg.vector_norm(other.float())):
            return f"the {name} differs from that of the model's logits by {float(difference):.3g}"
    return None
