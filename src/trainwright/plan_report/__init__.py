"""What a run would do, before it does anything: `Trainer.plan_report()` and `trainwright plan`.

Owns: the report: events, memory, disk, data, mistakes, its text. Leaves to others: how long a run is (`plan`), what is
wrong with data (`preflight`), stopping a program at its `train()` (`plan_script`). Nothing here changes what a
later `train()` does, and nothing is written.
"""
