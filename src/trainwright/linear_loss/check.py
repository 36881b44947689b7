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
    """How the loss of `logits`, (rows, classes), or one of its gradients where they are on, differs from that computed
    from all logits, on the first rows that have a label; None where they do not. `settings`: of `cross_entropy_of`.
    """
    rows = (targets != settings["ignore_index"]).nonzero().squeeze(1)[:MOST_ROWS]
    targets = targets[rows]
    bias = None if logits.bias is None else logits.bias.detach().requires_grad_(logits.bias.requires_grad)
    terms = [
        Term(hidden.detach()[rows].requires_grad_(), weight.detach().requires_grad_(weight.requires_grad))
        for hidden, weight in logits.terms
    ]
    inputs = {"the bias": bias}
    for number, (hidden, weight) in enumerate(terms):
        inputs |= {f"hidden states {number}": hidden, f"weight {number}": weight}
    asked = {name: one for name, one in inputs.items() if one is not None and one.requires_grad}
    real = logits.changed(terms=terms, bias=bias).materialized()
    alike = {name: settings[name] for name in ("ignore_index", "reduction", "label_smoothing")}
    ours, theirs = cross_entropy_of(terms, targets, bias, **settings), F.cross_entropy(real, targets, **alike)
    is_half = min(real.dtype.itemsize, settings["dtype"].itemsize) < 4
    bound = LARGEST_DIFFERENCE_IN_HALF if is_half else LARGEST_DIFFERENCE
    pairs = {"loss": (ours.detach(), theirs.detach())}
    if torch.is_grad_enabled():
        gradients = zip(*(torch.autograd.grad(loss, list(asked.values())) for loss in (ours, theirs)))
        pairs |= {f"gradient of {name}": pair for name, pair in zip(asked, gradients)}
    for name, (one, other) in pairs.items():
        norm = torch.linalg.vector_norm(other, dtype=torch.float32)
        difference = torch.linalg.vector_norm(one.sub_(other), dtype=torch.float32)
        if not bool(difference <= bound * norm):
            return (
                f"the {name} differs from that of the logits by {float(difference):.2g}, its norm is {float(norm):.2g}"
            )
    return None
