"""The one training loop: updates, their log, a validation after each epoch, and the state that is saved."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beitzoo.training.board import Board
from beitzoo.training.failure import NonFiniteError, Start, keep_failed, moved_names
from beitzoo.training.folder import BEST, LAST, LOG
from beitzoo.training.generators import generators_kept
from beitzoo.training.log import Display, Log, Value
from beitzoo.training.processes import Processes
from beitzoo.training.sections import RunSection, TrainSection
from beitzoo.training.sharding import own_part, whole
from beitzoo.training.signals import Interrupted, StopSignals
from beitzoo.training.state import TrainState, save_state
from beitzoo.training.tally import Means, Watch
from beitzoo.training.task import CountsItems, EndsEpochs, Metrics, Task, compute_loss

# Updates that are read from the device together, at most: what each started from is kept until then.
_UNREAD = 50


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
    """Train from a state to the end of the recipe, or of its patience; the state is then the last one.

    A run that is killed and started again from its last saved state ends bit-equal to one that was not, with the same
    number of processes and threads, on the same machine and versions. (From three processes on, PyTorch may add up
    gradients in another order after a restart.) An update is `batch_size` images whatever the number of processes.

    Raises:
        Interrupted: A signal asked the run to stop; its state was saved.
        NonFiniteError: A loss, a validation metric or a weight is not finite. The update that gave it, or the state
            that was measured, is in `failed/`; what was saved before stays.
    """
    names = (*task.log_names, *task.metric_names, *(task.epoch_names if isinstance(task, EndsEpochs) else ()))
    shown = run.processes.is_main
    board = Board(run.directory, state.update) if shown and run.settings.tensorboard else None
    log = Log(run.directory / LOG, names, state.update, board) if shown else None
    try:
        with Display(state.schedule.updates, state.update, shown) as display, StopSignals() as stop:
            _Fit(task, state, run, log, display, stop).to_the_end()
    finally:
        if log is not None:
            log.close()


@dataclass
class _Fit:
    """The work of `fit`.

    Attributes:
        pending: Of the updates since the last line: items, images, sums over the items of the loss and of what the
            task logs, and norm of the gradient. They are read together, since each read would wait for the device.
        starts: What these updates started from.
        lost: Whether an update failed; from then on no step is taken.
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
    starts: list[Start] = field(default_factory=list)
    lost: Tensor = field(init=False)
    images: float = 0.0
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        self.lost = torch.zeros((), dtype=torch.bool, device=self.run.processes.device)
        self._moved_names = moved_names(self.state.model)
        self._learning = sum(parameter.requires_grad for parameter in self.state.model.parameters())

    def to_the_end(self) -> None:
        """Do the updates that are left."""
        state, settings, updates = self.state, self.run.settings, self.state.schedule.updates
        model = self._trained_model()
        batches = self.task.batches(state.update)
        while not self._is_over():
            self._update(model, batches)
            ends_epoch = state.update % self.task.updates_per_epoch == 0 or state.update == updates
            ends_line = state.update % settings.log_updates == 0
            if ends_epoch or ends_line:
                self._end_line()
            with self.watch.paused():
                if ends_epoch:
                    self._end_epoch()
                number = self._stop_number(agreed=ends_epoch or ends_line)
                if number or self._is_over() or self._save_is_due(ends_epoch):
                    self._save()
            if number and not self._is_over():
                raise Interrupted(f"Stopped after {state.update} of {updates} updates; the state is saved.", number)

    def _is_over(self) -> bool:
        """Tell whether all updates are done, or the patience of the recipe is at its end."""
        state, patience = self.state, self.run.train.patience
        return state.update == state.schedule.updates or 0 < patience <= state.stale

    def _trained_model(self) -> nn.Module:
        """Return the model as the loss calls it; the one of the state is neither compiled nor wrapped."""
        model = self.state.model.train()
        compiled: Any = torch.compile(model) if self.run.train.compile else model  # annotated as any callable
        return compiled if self.state.empty is not None else self.run.processes.wrap(compiled)

    def _update(self, model: nn.Module, batches: Iterator[Any]) -> None:
        """Take one step down the gradient of the mean loss over all items of all processes."""
        state, train, processes = self.state, self.run.train, self.run.processes
        state.schedule.set(state.optimizer, state.update)
        before = self.starts[-1] if self.starts else None
        self.starts.append(Start.of(state.model, self._moved_names, processes.device, before))
        # The mean over all items is known only when all parts are done; until then each part counts for this many.
        share = train.batch_size / (processes.count * train.accumulation)
        sums = [self._add_gradients(model, batches, share, left) for left in reversed(range(train.accumulation))]
        total = processes.sum(torch.stack(sums).sum(0))
        state.scaler.unscale_(state.optimizer)
        correction = share * processes.count / total[0].clamp(min=1)
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        assert processes.count == 1 or len(gradients) == self._learning, (
            "Several processes wait for a gradient of each parameter; `unused_parameters` of a model names the others."
        )
        for gradient in gradients:
            gradient.mul_(correction)
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if train.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(state.model.parameters(), train.clip_grad, norm)
        self._step(total, norm)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.model)
        state.update += 1
        self.pending.append(torch.cat([total, norm.reshape(1)]))
        if len(self.pending) == _UNREAD:
            self._read_pending()
        self.display.advance()

    def _step(self, total: Tensor, norm: Tensor) -> None:
        """Take a step, unless the gradient is not finite. After an update that failed no other changes the weights.

        That it failed is read from the device later, with the line; till then the weights are those it started from.
        """
        overflowed = ~norm.isfinite()
        self.lost |= ~total[2].isfinite()
        if not self.state.scaler.is_enabled():  # the scaler of fp16 tries until its scale is right
            self.lost |= overflowed
        optimizer: Any = self.state.optimizer
        optimizer.found_inf = (self.lost | overflowed).float()  # what the scaler tells a fused optimizer
        optimizer.step()

    def _add_gradients(self, model: nn.Module, batches: Iterator[Any], share: float, left: int) -> Tensor:
        """Add the gradients of one batch, of which `left` more will come; return its items, images and sums."""
        processes, precision = self.run.processes, self.run.train.precision
        with self.watch.waiting():
            batch = next(batches)
        with processes.without_average(model) if left else nullcontext():
            loss, count, logs = compute_loss(self.task, model, batch, precision, processes.device)
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
        """Validate if it is due, and let the main process write down how the epoch went, and the model."""
        state, task = self.state, self.task
        state.model.eval()
        if isinstance(task, CountsItems):
            task.take_counts()
        with state.whole() as model:
            metrics = task.validate(model) if self._validation_is_due() else None
            self._check_epoch(metrics or {})
            better = metrics is not None and (not metrics or state.best is None or task.better(metrics, state.best))
            state.best = metrics if better else state.best
            state.stale = 0 if better else state.stale + (metrics is not None)
            if self.log is not None:
                self._write_epoch(model, metrics or {}, better)
        state.epoch = Means()
        state.model.train()

    def _check_epoch(self, metrics: Metrics) -> None:
        """Stop if a metric or a weight is not finite; the state is kept, and measures the same again."""
        state, run = self.state, self.run
        odd = [f"{name} ({value})" for name, value in metrics.items() if not math.isfinite(value)]
        if not odd and self._is_finite(state.evaluated):
            return
        what = f"The validation metric {odd[0]}" if odd else "A weight"
        start = Start.of(state.model, self._moved_names, run.processes.device)
        command = keep_failed(None, state, start, run.directory, run.processes)
        raise self._non_finite(what, state.update, f"The state was kept; `{command}` measures it again.")

    def _validation_is_due(self) -> bool:
        """Tell whether this epoch has one; a task without metrics is asked each time, as its last model is the best."""
        state, every = self.state, self.run.train.val_epochs
        return (
            not self.task.metric_names
            or self._epoch(state.update) % every == 0
            or state.update == state.schedule.updates
        )

    def _epoch(self, update: int) -> int:
        """Return the epoch, from 1, that an update is in."""
        return -(-update // self.task.updates_per_epoch)

    def _write_epoch(self, model: nn.Module, metrics: Metrics, better: bool) -> None:
        """Write the line of an epoch, and the model as the last and perhaps the best; without metrics they are one."""
        task, directory, epoch = self.task, self.run.directory, self._epoch(self.state.update)
        assert self.log is not None
        if isinstance(task, EndsEpochs):
            with generators_kept(self.run.processes.device):
                metrics = {**metrics, **task.end_epoch(model, epoch, directory)}
        values = {**self._line("epoch", self.state.epoch), **metrics}
        self.log.write(values)
        self.display.show_epoch(values, metrics)
        kept = (BEST, LAST) if task.metric_names else (BEST,)
        for name in kept if better else (LAST,):
            task.save(model, directory / name)

    def _line(self, kind: str, means: Means) -> dict[str, Value]:
        state = self.state
        state.seconds += self.watch.count()
        return {
            "line": kind,
            "epoch": self._epoch(state.update),
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
            lost = self._what_is_lost(items, totals[0], norm)
            if lost:
                raise self._failed(lost, update, self.starts[update - first])
            self.images += images
            self.state.line.add(items, totals, norm)
            self.state.epoch.add(items, totals, norm)
        self.pending.clear()
        self.starts.clear()

    def _what_is_lost(self, items: float, total: float, norm: float) -> str:
        if not math.isfinite(total):
            return f"The loss is {total / max(items, 1)}: it"
        if not math.isfinite(norm) and not self.state.scaler.is_enabled():
            return "The gradient"
        return ""

    def _save(self) -> None:
        self._read_pending()
        if not self._is_finite(self.state.model):
            raise self._non_finite("A weight", self.state.update)
        self.state.seconds += self.watch.count()
        if self.log is not None:
            self.log.sync()
        save_state(self.state, self.run.directory, self.run.processes)

    def _is_finite(self, model: nn.Module) -> bool:
        """Tell whether all weights are finite, in whichever process they are."""
        finite = torch.stack([own_part(parameter.detach()).isfinite().all() for parameter in model.parameters()]).all()
        return not self.run.processes.largest(int(not finite))

    def _save_is_due(self, ends_epoch: bool) -> bool:
        settings, update = self.run.settings, self.state.update
        if settings.save_updates and update % settings.save_updates == 0:
            return True
        return ends_epoch and self._epoch(update) % settings.save_epochs == 0

    def _stop_number(self, agreed: bool) -> int:
        """Return the signal that asks to stop, if any; several processes agree on it only now and then."""
        if self.run.processes.count == 1:
            return self.stop.number
        return self.run.processes.largest(self.stop.number) if agreed else 0

    def _failed(self, what: str, update: int, start: Start) -> NonFiniteError:
        """Keep what an update started from."""
        state, run = self.state, self.run
        state.update = update - 1
        batches = list(islice(self.task.batches(state.update), run.train.accumulation))
        command = keep_failed(batches, state, start, run.directory, run.processes)
        return self._non_finite(
            what, update, f"Its batch and the state before it were kept; `{command}` does it again."
        )

    def _non_finite(self, what: str, update: int, kept: str = "Nothing of this was saved.") -> NonFiniteError:
        rate = self.state.schedule.lr(update - 1)
        return NonFiniteError(
            f"{what} is not finite any more at update {update} (epoch {self._epoch(update)}), "
            f"with a learning rate of {rate:.3g}. {kept} In another folder, try a lower train.lr, a longer warm-up, "
            "train.clip_grad=1, or train.precision=fp32."
        )
