"""What `loop_state.json` holds: the position of a run, apart from weights, optimizer and `trainer_state.json`.

Owns: its shape on disk (`LoopState`), what differs between processes, the position of a checkpoint that another
implementation wrote. Leaves to others: files and their verification (`checkpoint`), whose values these are (`run`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from trainwright.checkpoint.load import load_loop_state
from trainwright.window import LossWindow


class Position(TypedDict):
    """Where in the data. A pass that is over counts as the start of the next."""

    epoch: int  # whole passes over the data that are done
    samples_in_epoch: int  # of the next one, over all processes


class Batching(TypedDict):
    """What decides how many micro-batches a pass over the data has."""

    samples_per_micro_batch: int  # over all processes
    gradient_accumulation_steps: int  # micro-batches of an update
    planned_together: int  # micro-batches that a sampler makes of one lot of samples: their number is a multiple of it
    micro_batches_per_epoch: int | None  # None: the data have no length


class LastUpdate(TypedDict):
    """Of the last update, as a log line has them."""

    learning_rate: float | None
    grad_norm: float | None


class LoopState(TypedDict, total=False):
    """`loop_state.json`, field by field. A file of an earlier commit may lack those that came later."""

    position: Position
    # Of each process; the file has those of the first, and under "processes" what others have in their place.
    epoch_start_generators: dict[str, Any] | None  # as `RngState.to_json` gives them, from this epoch's start
    collator_generator: Any  # as `collator_rng.states` gives them
    window: dict[str, Any]  # as `LossWindow.state` gives it
    processes: list[dict[str, Any]]
    micro_batches: int  # of the next pass that are done, counted as `batching` says
    batching: Batching | None
    samples_of_pass: int | None  # of the last pass that ended before the length that was announced
    last_update: LastUpdate | None
    # The end of an epoch (the event, and what a run logs, evaluates and saves then) is still to come: of the pass
    # before, or of this one, where the run made its last update in it.
    owes_epoch_end: bool
    total_loss: float  # sum of the losses of all updates that were logged
    last_logged_step: int  # updates done at the last log line
    worker_shares: dict[str, Any] | None  # of a stream, as `seek.WorkerShares.to_dict` gives them
    batch_size: dict[str, Any] | None  # found by `auto_find_batch_size`, as `FoundBatchSize.to_save` gives it
    save_only_model: bool
    run: dict[str, Any] | None  # the record of the run that wrote it, as `runs.continued` gives it
    arguments: dict[str, Any]  # of the run that wrote it


def initial(epoch: int = 0, samples_in_epoch: int = 0, last_logged_step: int = 0) -> LoopState:
    """Of a run that begins, or is resumed where only its position is known."""
    return {
        "position": {"epoch": epoch, "samples_in_epoch": samples_in_epoch},
        "total_loss": 0.0,
        "last_logged_step": last_logged_step,
    }


def of_all_processes(local: Mapping[str, Any], gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """`local`, which this process holds, as the file has it: of rank 0, and what the others have in its place.

    `gather`: the values of all processes, which call this together.
    """
    first, *others = gather(dict(local))
    differences = [{}, *({name: value for name, value in other.items() if value != first[name]} for other in others)]
    return {**first, **({"processes": differences} if others else {})}


def read(
    checkpoint: str,
    window: LossWindow,
    *,
    global_step: int,
    updates_per_epoch: int,
    samples_per_update: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> LoopState:
    """The state in `checkpoint`, made at `global_step`, for this process; its running loss goes into `window`.

    With another number of processes than the checkpoint's each gets the mean of the parts, so that the mean over the
    processes, which is what a log line shows, is that of all updates since the last one. Other implementations write no
    such file; their position is counted in updates.
    """
    saved = load_loop_state(checkpoint)
    if not saved:
        epoch, updates = divmod(global_step, updates_per_epoch)
        return initial(epoch, updates * samples_per_update, last_logged_step=global_step)
    processes = [{**saved, **part} for part in saved.get("processes") or [{}]]
    if len(processes) == num_processes:
        saved = processes[process_index]
        window.load_state(saved["window"])
    else:
        parts = [process["window"] for process in processes]
        window.load_state({name: sum(part[name] for part in parts) / len(parts) for name in ("sum", "num_losses")})
    return saved  # type: ignore[return-value]
