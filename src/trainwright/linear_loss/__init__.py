"""The cross-entropy of a linear head without its logits: `linear_cross_entropy`.

Owns: the loss in chunks (`function`), logits that are not computed until something other than their loss needs them
(`deferred`), which models it is used for and its comparison with the model's own loss (`heads`). Leaves to others: when
a model is called (Trainer), what a loss is averaged over (`loss`).
"""
