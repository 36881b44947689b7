"""NaN and infinity: detected before the optimizer step, without a host sync.

Owns: the policies of `nonfinite` ("raise", "skip", "rollback"; "ignore" has no guard): checking each update (`guard`),
describing a bad one and deciding on a rollback (`updates`), refusing to save weights that are not finite (`weights`).
Leaves to others: the loop that calls it, the losses (`window`), going back to a checkpoint (`attempts`), fp16, whose
loss scaler skips updates itself.

How an update is kept out of the weights and the optimizer's state, without touching a bit of either:

- On a CPU, every optimizer: the host reads the numbers, which are in its memory, and does not call `step`.
- On an accelerator, torch's fused optimizers (the default `adamw_torch_fused`, any built with `fused=True`): the kernel
  reads a flag on the device and does nothing. The host reads it at the next log line, save, or 1024 updates later.
  After the first such update "raise" and "rollback" hold back all others, so the weights are those before it.
- On an accelerator, other optimizers: nothing can be held back without a sync. "skip" syncs, one read per update;
  "raise" and "rollback" cost nothing and detect late: no checkpoint is written, but the weights in memory hold the
  update.
- Optimizers that update during the backward pass (LOMO, layer-wise): "raise" and "rollback" as the last, no "skip".

Cost per update: one small operation, none between two micro-batches. Without clipping also one pass over the gradients:
on a CPU in the same operation, on an accelerator for their norms. Every rank has the averaged gradients, so all decide
alike; a loss that is not finite while the gradients are is known to one rank only, and blocks nothing when there are
several: it is found later.
"""
