"""NaN and infinity: found before the optimizer, without making the host wait for the device.

Owns: what `nonfinite` says ("raise", "skip", "rollback"; "ignore" has no guard): looking at each update (`guard`), what
is told of one that is bad and whether to go back (`updates`), refusing to save weights that are not finite (`weights`).
Leaves to others: the loop that asks, the losses (`window`), going back to a checkpoint (`attempts`), fp16, whose loss
scale has its own way to leave updates out.

How an update is kept from the weights and the optimizer's state, without touching a bit of either:

- On a CPU every optimizer: the host looks at the numbers, which lie in its own memory, and does not call `step`.
- On an accelerator torch's fused optimizers (the default `adamw_torch_fused`, any built with `fused=True`): the kernel
  reads a flag on the device and does nothing. The host learns of it at the next log line, save, or 1024 updates later.
  After the first such update "raise" and "rollback" hold back all others, so the weights are those before it.
- On an accelerator other optimizers: nothing can be held back without asking. "skip" asks, one read per update; "raise"
  and "rollback" stay free and find out late: no checkpoint is written, but the weights in memory hold the update.
- Optimizers that update during the backward pass (LOMO, layer-wise): "raise" and "rollback" as the last, no "skip".

Cost per update: one small operation, none between two micro-batches. Without clipping also one pass over the gradients:
on a CPU in the same operation, on an accelerator for their norms. Every process sees the gradients of all, so all
decide alike; a loss that is not finite while the gradients are is known to one process only, and blocks nothing when
there are several: it is found later.
"""
