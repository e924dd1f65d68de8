"""What may interrupt a training loop: steps that would break the weights, and a stop signal."""

import math
import signal
import statistics
from typing import Any

from utils.cli import UserError
from utils.hardening.files import append_line, keep_lines
from utils.log import TrainLog
from utils.optimizer import unshard

import torch
from torch import Tensor

from models.distributed import mean_over_ranks, n_ranks, rank


class StopSignal:
    """Ctrl-C or SIGTERM lets the current step finish; a second signal stops at once."""

    def __init__(self):
        self.received = False  # by this process
        self.agreed = False  # by all processes; StepGuard shares it out
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    @property
    def asked(self) -> bool:
        """Has anyone asked to stop? The same answer in every process."""
        return self.received if n_ranks() == 1 else self.agreed


class StepGuard:
    """Skips steps without a finite loss and gradient, and notes odd batches in odd_batches.jsonl.

    Odd is a batch without a finite loss, or one whose loss is far above the last ones. A line
    holds the numbers of the frames at which its clips begin.
    """

    def __init__(self, log: TrainLog, start_step: int, max_skipped: int = 20):
        self.log, self.max_skipped = log, max_skipped
        self.path = log.folder / "odd_batches.jsonl"
        self.skipped_in_a_row = 0
        self.lines = keep_lines(self.path, start_step) if rank() == 0 else []

    def is_finite(
        self, step: int, loss: Tensor, grad_norm: Tensor, train: Any = None, saved: str = ""
    ) -> bool:
        """May this step be taken? Also lets all processes agree on whether to stop.

        saved: what to say of the last checkpoint when too many steps in a row were skipped.
        """
        stop = self.log.stop
        values = [loss.detach().float(), unshard(grad_norm.detach()).float()]
        values.append(loss.new_tensor(stop.received).float())
        loss, grad_norm, received = mean_over_ranks(torch.stack(values)).tolist()
        stop.agreed = received > 0
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite or self._leaps(loss):
            first_frames = []
            if train is not None:
                first_frames = train.first_frames(step, self.log.cfg.accumulate).tolist()
            self._note(step + 1, loss, grad_norm, finite, first_frames)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == self.max_skipped:
            raise UserError(
                f"loss or gradient was no finite number {self.skipped_in_a_row} steps in a row,"
                f" up to step {step + 1:,}; {saved or 'nothing was saved yet'};"
                f" look at {self.path}, and try a smaller --learning-rate or --dtype float32"
            )
        return finite

    def _leaps(self, loss):
        """Is it above the median of the last 20 by their size or ten times their scatter?"""
        losses = [line["loss"] for line in self.log.lines[-40:] if "loss" in line][-20:]
        if len(losses) < 20:
            return False
        median = statistics.median(losses)
        scatter = statistics.median([abs(x - median) for x in losses])
        return loss > median + max(abs(median), 10 * scatter)

    def _note(self, step, loss, grad_norm, finite, first_frames):
        line = dict(
            step=step,
            loss=loss if finite else str(loss),
            grad_norm=grad_norm if finite else str(grad_norm),
            skipped=not finite,
            first_frames=first_frames,
        )
        self.lines.append(line)
        if rank() == 0:
            append_line(self.path, line)

    def report(self) -> None:
        """Say how many steps were skipped, if any were."""
        if skipped := sum(line["skipped"] for line in self.lines):
            print(f"{skipped} steps were skipped: loss or gradient was not finite; see {self.path}")
