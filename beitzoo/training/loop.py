"""The one training loop: updates, their log, a validation after each epoch, and the state that is saved."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.errors import UserError
from beitzoo.training.board import Board
from beitzoo.training.folder import BEST, LAST
from beitzoo.training.generators import generators_kept
from beitzoo.training.log import Display, Log, Value
from beitzoo.training.processes import Processes
from beitzoo.training.sections import RunSection, TrainSection
from beitzoo.training.signals import Interrupted, StopSignals
from beitzoo.training.state import TrainState, save_state
from beitzoo.training.tally import Means, Watch
from beitzoo.training.task import EndsEpochs, Metrics, Task

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(UserError, ArithmeticError):
    """A loss, a metric or a weight that is no number any more."""


@dataclass(frozen=True)
class Run:
    """Where and how a task is trained.

    Attributes:
        directory: Receives `log.csv`, `tensorboard/`, `best/`, `last/` and the saved state.
        train: What decides the result.
        settings: What does not.
        processes: Those that train together.
    """

    directory: Path
    train: TrainSection
    settings: RunSection
    processes: Processes


def fit(task: Task, state: TrainState, run: Run) -> None:
    """Train from a state to the end of the recipe; the state is then the last one.

    A run that is killed and started again from its last saved state ends bit-equal to one that was not, with the same
    number of processes and threads, on the same machine and versions. (From three processes on, PyTorch may add up
    gradients in another order after a restart.) An update is `batch_size` images whatever the number of processes.

    Raises:
        Interrupted: A signal asked the run to stop; its state was saved.
        NonFiniteError: A loss is not finite. Neither this model nor its state was saved.
    """
    names = (*task.log_names, *task.metric_names, *(task.epoch_names if isinstance(task, EndsEpochs) else ()))
    shown = run.processes.is_main
    board = Board(run.directory, state.update) if shown and run.settings.tensorboard else None
    log = Log(run.directory / "log.csv", names, state.update, board) if shown else None
    updates = run.train.epochs * task.updates_per_epoch
    try:
        with Display(updates, state.update, shown) as display, StopSignals() as stop:
            _Fit(task, state, run, log, display, stop).to(updates)
    finally:
        if log is not None:
            log.close()


@dataclass
class _Fit:
    """The work of `fit`.

    Attributes:
        pending: Of the updates since the last line: items, images, sums over the items of the loss and of what the
            task logs, and norm of the gradient. They are read together, since each read would wait for the device.
        images: Seen by all processes since the last line.
        watch: Where the time goes.
    """

    task: Task
    state: TrainState
    run: Run
    log: Log | None
    display: Display
    stop: StopSignals
    pending: list[Tensor] = field(default_factory=list)
    images: float = 0.0
    watch: Watch = field(default_factory=Watch)

    def to(self, updates: int) -> None:
        """Do the updates that are left."""
        state, settings = self.state, self.run.settings
        model = self._trained_model()
        batches = self.task.batches(state.update)
        while state.update < updates:
            self._update(model, batches)
            ends_epoch = state.update % self.task.updates_per_epoch == 0
            ends_line = state.update % settings.log_updates == 0
            if ends_epoch or ends_line:
                self._end_line()
            with self.watch.paused():
                if ends_epoch:
                    self._end_epoch()
                number = self._stop_number(agreed=ends_epoch or ends_line)
                if number or state.update == updates or self._save_is_due(ends_epoch):
                    self._save()
            if number and state.update < updates:
                raise Interrupted(f"Stopped after {state.update} of {updates} updates; the state is saved.", number)

    def _trained_model(self) -> nn.Module:
        """Return the model as the loss calls it; the one of the state is neither compiled nor wrapped."""
        model = self.state.model.train()
        compiled: Any = torch.compile(model) if self.run.train.compile else model  # annotated as any callable
        return self.run.processes.wrap(compiled)

    def _update(self, model: nn.Module, batches: Iterator[Any]) -> None:
        """Take one step down the gradient of the mean loss over all items of all processes."""
        state, train, processes = self.state, self.run.train, self.run.processes
        state.schedule.set(state.optimizer, state.update)
        # The mean over all items is known only when all parts are done; until then each part counts for this many.
        share = train.batch_size / (processes.count * train.accumulation)
        sums = [self._add_gradients(model, batches, share, left) for left in reversed(range(train.accumulation))]
        total = processes.sum(torch.stack(sums).sum(0))
        state.scaler.unscale_(state.optimizer)
        correction = share * processes.count / total[0].clamp(min=1)
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        for gradient in gradients:
            gradient.mul_(correction)
        norm = torch.nn.utils.get_total_norm(gradients)
        if train.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(state.model.parameters(), train.clip_grad, norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.model)
        state.update += 1
        self.pending.append(torch.cat([total, norm.reshape(1)]))
        self.display.advance()

    def _add_gradients(self, model: nn.Module, batches: Iterator[Any], share: float, left: int) -> Tensor:
        """Add the gradients of one batch, of which `left` more will come; return its items, images and sums."""
        processes, precision = self.run.processes, self.run.train.precision
        with self.watch.waiting():
            batch = next(batches)
        with processes.without_average(model) if left else nullcontext():
            with torch.autocast(processes.device.type, _AUTOCAST[precision], enabled=precision != "fp32"):
                loss, count, logs = self.task.loss(model, batch)
            self.state.scaler.scale(loss * (count / share)).backward()
        means = [loss.detach().float(), *(logs[name].detach().float() for name in self.task.log_names)]
        one = torch.ones_like(means[0])
        return torch.stack([one * count, one * self.task.count_images(batch), *(mean * count for mean in means)])

    def _end_line(self) -> None:
        """Write the means since the last line."""
        self._read_pending()
        values = {**self._line("updates", self.state.line), **self.watch.end_line(self.images)}
        self.images = 0.0
        self.state.line = Means()
        if self.log is not None:
            self.log.write(values)
        self.display.show(values)

    def _end_epoch(self) -> None:
        """Validate, and let the main process write down how the epoch went, and the model."""
        state, task = self.state, self.task
        state.model.eval()
        metrics = task.validate(state.evaluated)
        if not all(map(math.isfinite, metrics.values())) or not _is_finite(state.evaluated):
            raise self._non_finite("A validation metric or a weight", state.update)
        better = not metrics or state.best is None or task.better(metrics, state.best)
        state.best = metrics if better else state.best
        if self.log is not None:
            self._write_epoch(metrics, better)
        state.epoch = Means()
        state.model.train()

    def _write_epoch(self, metrics: Metrics, better: bool) -> None:
        """Write the line of an epoch, and the model as the last and perhaps the best; without metrics they are one."""
        state, task, directory = self.state, self.task, self.run.directory
        assert self.log is not None
        if isinstance(task, EndsEpochs):
            with generators_kept(self.run.processes.device):
                epoch = state.update // task.updates_per_epoch
                metrics = {**metrics, **task.end_epoch(state.evaluated, epoch, directory)}
        values = {**self._line("epoch", state.epoch), **metrics}
        self.log.write(values)
        self.display.show_epoch(values, metrics)
        kept = (BEST, LAST) if task.metric_names else (BEST,)
        for name in kept if better else (LAST,):
            task.save(state.evaluated, directory / name)

    def _line(self, kind: str, means: Means) -> dict[str, Value]:
        state = self.state
        state.seconds += self.watch.count()
        return {
            "line": kind,
            "epoch": -(-state.update // self.task.updates_per_epoch),
            "update": state.update,
            "lr": state.schedule.lr(state.update - 1),
            "weight_decay": state.schedule.weight_decay(state.update - 1),
            "seconds": round(state.seconds, 3),
            **means.values(("loss", *self.task.log_names)),
        }

    def _read_pending(self) -> None:
        """Add up what the updates since the last line gave; stop at the first whose loss is not finite."""
        if not self.pending:
            return
        first = self.state.update - len(self.pending) + 1
        for update, (items, images, *totals, norm) in enumerate(torch.stack(self.pending).tolist(), first):
            if not math.isfinite(totals[0]):
                raise self._non_finite(f"The loss is {totals[0] / max(items, 1)}: it", update)
            self.images += images
            self.state.line.add(items, totals, norm)
            self.state.epoch.add(items, totals, norm)
        self.pending.clear()

    def _save(self) -> None:
        self._read_pending()
        if not _is_finite(self.state.model):
            raise self._non_finite("A weight", self.state.update)
        self.state.seconds += self.watch.count()
        if self.log is not None:
            self.log.sync()
        save_state(self.state, self.run.directory, self.run.processes)

    def _save_is_due(self, ends_epoch: bool) -> bool:
        settings, update = self.run.settings, self.state.update
        if settings.save_updates and update % settings.save_updates == 0:
            return True
        return ends_epoch and (update // self.task.updates_per_epoch) % settings.save_epochs == 0

    def _stop_number(self, agreed: bool) -> int:
        """Return the signal that asks to stop, if any; several processes agree on it only now and then."""
        if self.run.processes.count == 1:
            return self.stop.number
        return self.run.processes.largest(self.stop.number) if agreed else 0

    def _non_finite(self, what: str, update: int) -> NonFiniteError:
        rate = self.state.schedule.lr(update - 1)
        return NonFiniteError(
            f"{what} is not finite any more at update {update} (epoch {-(-update // self.task.updates_per_epoch)}), "
            f"with a learning rate of {rate:.3g}. Nothing of this was saved. In another folder, try a lower "
            "train.lr, more train.warmup_epochs, train.clip_grad=1, or train.precision=fp32."
        )


def _is_finite(model: nn.Module) -> bool:
    return bool(torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()]).all())
