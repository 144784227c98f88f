"""The training loop: steps, stops, checkpoints, evaluations, in an order that resumes exactly."""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline import tasks
from pipeline.config import Config
from pipeline.data import Batch, Loader
from pipeline.distributed import World
from pipeline.evaluate import EvaluationStopped
from pipeline.models import Network, Output
from pipeline.training import phases, relaxation, statistics, steps
from pipeline.training.average import WeightAverage
from pipeline.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from pipeline.training.engine import Engine
from pipeline.training.metrics import Window
from pipeline.training.randomness import RandomStates
from pipeline.training.restore import load_model

log = logging.getLogger(__name__)


class Outcome(enum.Enum):
    """How a call of `Trainer.train` ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class Verdict(NamedTuple):
    """What the ranks agree on at a step: any rank's wish is every rank's."""

    bad: bool = False  # a loss is not finite
    stop: bool = False
    late: bool = False  # rank 0's clock asks for a checkpoint
    over: bool = False  # the phase ends here
    enough: bool = False  # these are the steps that were asked for


class NonFiniteLoss(RuntimeError):
    """The loss of some rank is NaN or infinite, or the weights are: nothing of it is saved."""


class MetricSink(Protocol):
    """Where metrics go; only rank 0 has one that keeps them."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...


class Stateful(Protocol):
    """A named part of the state that a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """How far training is; `keys_digest` chains the hash of this rank's ordered sample keys.

    `phase` counts from 0 and is the number of phases once all are done; `phase_start` is the step
    that it began at. `over` in a checkpoint: this is the last step of the phase, which ends after
    its evaluation.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    keys_digest: str = ""
    phase: int = 0
    phase_start: int = 0
    over: bool = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

    def count(self, batch: Batch) -> None:
        text = self.keys_digest + "\n".join(batch.keys)
        self.keys_digest = hashlib.sha256(text.encode()).hexdigest()
        self.samples += len(batch.keys)


class Trainer:
    """One run on one rank.

    Args:
        build_engine: called with the configuration of a phase and its steps, when it begins.
        evaluate: called with the step, on all ranks, after an epoch or a phase; of its metrics, the
            task's score decides which checkpoint of the last phase is the best. It may raise
            EvaluationStopped on all ranks, and is then called again when the run is resumed.
        shared: further parts of the state that are the same on all ranks.
        identity: what a checkpoint must agree on to be resumed here.
        stop_requested: asked at each step; one rank's wish stops all after the step.
        on_step: called after each optimizer step with (step, steps in all, latest metrics).
    """

    def __init__(
        self,
        *,
        config: Config,
        world: World,
        model: Network,
        build_engine: Callable[[Config, int], Engine],
        loader: Loader,
        store: CheckpointStore,
        evaluate: Callable[[int], dict[str, float]],
        sink: MetricSink,
        shared: Mapping[str, Stateful],
        identity: Mapping[str, Any],
        run_dir: Path,
        stop_requested: Callable[[], bool],
        average: WeightAverage | None = None,
        on_step: Callable[[int, int, Mapping[str, float]], None] = lambda *_: None,
    ) -> None:
        self.config = config
        self.world = world
        self.model = model
        self.build_engine = build_engine
        self.loader = loader
        self.store = store
        self.evaluate = evaluate
        self.sink = sink
        self.identity = dict(identity)
        self.run_dir = run_dir
        self.average = average
        self.stop_requested = stop_requested
        self.on_step = on_step
        self.progress = Progress()
        self.statistics = statistics.LocalStatistics(model)
        self.movement = phases.PolicyMovement(world)
        self.shared: dict[str, Stateful] = {"data": loader, **shared}
        self.own: dict[str, Stateful] = {
            "progress": self.progress,
            "random": RandomStates(world.device),
            "statistics": self.statistics,
            "movement": self.movement,
        }
        self.steps_per_epoch = loader.steps_per_epoch // config.train.accumulation
        self.lengths = [phases.most_steps(p, self.steps_per_epoch) for p in config.all_phases]
        self._begin_phase()
        self.relaxation = relaxation.of(config, model, sum(self.lengths))
        self._due = False  # the evaluation at this step, which comes before the next
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._window = Window()
        self._latest: dict[str, float] = {}

    def train(self, stop_after: int | None = None) -> Outcome:
        """Train to the end of the last phase, a stop that is requested, or `stop_after` steps.

        Raises:
            NonFiniteLoss: on all ranks, before the update.
            CheckpointError: the last checkpoint could not be written.
        """
        progress = self.progress
        if self._due or progress.over:
            left = Verdict(over=progress.over)
            if self._settle(left, evaluate=self._due):
                return Outcome.INTERRUPTED
        while not self.finished:
            stopped = False
            for batch in self.loader:
                verdict = self._micro_step(batch)
                if not self.engine.updated:
                    continue
                progress.step += 1
                enough = stop_after is not None and progress.step >= stop_after
                verdict = verdict._replace(enough=enough, over=self._phase_over())
                self._after_update(verdict)
                if progress.step % self.steps_per_epoch == 0:
                    continue  # the epoch's last: what is due is done once the loader has ended it
                stopped = self._settle(verdict, evaluate=verdict.over)
                if stopped or self.finished:
                    break
            else:
                progress.epoch += 1
                every = self.config.train.evaluate_every
                due = verdict.over or progress.epoch % every == 0
                stopped = self._settle(verdict, evaluate=due)
            if stopped and not self.finished:
                return Outcome.INTERRUPTED
        return Outcome.FINISHED

    @property
    def finished(self) -> bool:
        return self.progress.phase == len(self.lengths)

    # -- phases --------------------------------------------------------------------------------

    def _begin_phase(self) -> None:
        """Freeze, thaw and build what the phase that `progress` is in needs; the last one stays."""
        number = min(self.progress.phase, len(self.lengths) - 1)
        self.phase, self.length = self.config.all_phases[number], self.lengths[number]
        phases.prepare(self.model, self.config, self.phase)
        own = self.config.during(self.phase)
        self.task = tasks.of(own)
        self.engine: Engine = self.build_engine(own, self.length)
        self.shared["engine"] = self.engine

    def _phase_over(self) -> bool:
        """After an optimizer step; collective where the policy decides."""
        done = self.progress.step - self.progress.phase_start
        settled = self.phase.until is not None and self.movement.settled(self.phase.until)
        return done >= self.length or settled

    def _end_phase(self) -> None:
        if self.config.phases:
            log.info("phase %s ended at step %d", self.phase.name, self.progress.step)
        self.progress.phase += 1
        self.progress.phase_start = self.progress.step
        if not self.finished:
            self.movement.restart()
            self.statistics.agree(self.world)
            self.engine.close()
            self._begin_phase()

    # -- one step ------------------------------------------------------------------------------

    def _micro_step(self, batch: Batch) -> Verdict:
        """Forward, agree, backward, step."""
        output, terms = self._forward(batch)
        loss = torch.stack(list(terms.values())).sum()
        agreed = self._exchange(loss)
        self.engine.backward(loss)
        verdict = agreed()
        if verdict.bad:
            self._refuse(batch, terms)
        self.engine.step()
        self.progress.count(batch)
        if self.phase.until:
            self.movement.add(output)
        self._window.add(terms, self.task.training_metrics(output, batch), output)
        return verdict

    def _forward(self, batch: Batch) -> tuple[Output, dict[str, Tensor]]:
        """The output, at the largest number of steps taken, and the loss terms of all taken."""
        config, terms, draws = self.config, dict[str, Tensor](), self.phase.draws
        done = (self.progress.step - self.progress.phase_start) / max(1, self.length - 1)
        taken = steps.taken(config.steps, config.seed, self.progress.step, self.engine.micro_batch)
        for number, weight in taken * draws:
            output = self.engine.forward(batch.images, number)
            found = self.task.loss_terms(output, batch, self.world, done)
            for name, term in found.items():
                terms[name] = terms.get(name, 0.0) + weight / draws * term
        if self.relaxation:
            terms["pull"] = self.relaxation.term(self.progress.step)
        return output, terms

    def _exchange(self, loss: Tensor) -> Callable[[], Verdict]:
        """Start to ask all ranks what the next step boundary must do.

        On CUDA the answer travels while the backward pass is queued, so that waiting for it does
        not leave the device idle.
        """
        minutes = self.config.checkpoints.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        wishes = torch.tensor([self.stop_requested(), late and self.world.is_main]).float()
        bad = 1.0 - loss.detach().isfinite().float()
        flags = self.world.sum(torch.cat([bad[None], wishes.to(loss.device, non_blocking=True)]))
        answer = flags.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if loss.is_cuda else None
        if arrived:
            arrived.record()

        def agreed() -> Verdict:
            if arrived:
                arrived.synchronize()
            return Verdict(*(count > 0 for count in answer.tolist()))

        return agreed

    def _refuse(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        values = {name: float(value.detach()) for name, value in terms.items()}
        ranks = self.world.gather({"loss": str(values), "keys": list(batch.keys)})
        path = self.run_dir / f"nonfinite-step-{self.progress.step:09d}.json"
        if self.world.is_main:
            path.write_text(json.dumps({"step": self.progress.step, "ranks": ranks}, indent=1))
        raise NonFiniteLoss(
            f"the loss is not finite at step {self.progress.step} ({values} on rank "
            f"{self.world.rank}); the batch's sample keys are in {path}. The weights were not "
            "updated and the last checkpoint is good: lower optimizer.lr, set "
            "optimizer.clip_norm, or look at those samples, in a new run"
        )

    def _after_update(self, verdict: Verdict) -> None:
        if self.average:
            self.average.update(self.model)
        step, every = self.progress.step, self.config.train.log_every
        if verdict.over or step % every == 0 or step % self.steps_per_epoch == 0:
            self._log_point()
        self.on_step(step, sum(self.lengths), self._latest)

    def _log_point(self) -> None:
        window, self._window = self._window, Window()
        point = window.point(self.world)
        point |= {f"lr/{name}": lr for name, lr in self.engine.applied_rates.items()}
        if (scale := self.engine.loss_scale()) is not None:
            point["train/loss_scale"] = scale
        if self.relaxation:
            point |= self.relaxation.metrics(self.progress.step)
        point["epoch"] = self.progress.step / self.steps_per_epoch
        if self.config.phases:
            point["phase"] = self.progress.phase + 1
        self._latest = point
        self.sink.metrics(point, self.progress.step)

    # -- epochs and checkpoints ----------------------------------------------------------------

    def _settle(self, verdict: Verdict, *, evaluate: bool) -> bool:
        """At a step's end: save if there is a reason, evaluate if asked, go on to the next phase if
        it is time. Whether training stops here.

        What has another reason than the evaluation's score is saved before it, and says that it is
        still to come: a kill or a stop in the middle of it costs no step.
        """
        progress, score = self.progress, None
        last = progress.phase == len(self.lengths) - 1
        must = verdict.stop or verdict.enough or (verdict.over and last)
        if evaluate:
            self._due, progress.over = True, verdict.over
            if must or self._checkpoint_due(verdict):
                self._save(must=must)
            metrics = None if verdict.stop else self._evaluated()
            if metrics is None:
                self._save(must=True)
                log.info("the evaluation at step %d is left to the resumed run", progress.step)
                return True
            found = metrics[self.task.score]
            # Other weights, and those of earlier phases, are never the best.
            score = found if math.isfinite(found) and last else None
        self._due = progress.over = False
        graded = evaluate and self._saved_step == progress.step
        if graded:
            self._grade(score, must=must)
        if verdict.over:
            self._end_phase()
        if not graded and (must or self._is_best(score) or self._checkpoint_due(verdict)):
            self._save(must=must, score=score)
        return verdict.stop or verdict.enough

    def _evaluated(self) -> dict[str, float] | None:
        """The metrics, given to the sink, too; None where a rank was asked to stop meanwhile."""
        try:
            with self.statistics.averaged(self.world):
                metrics = self.evaluate(self.progress.step)
        except EvaluationStopped:
            return None
        self.sink.metrics(metrics, self.progress.step)
        self._window = Window()  # the time of the evaluation is not training's
        return metrics

    def _grade(self, score: float | None, must: bool) -> None:
        """Tell the checkpoint of this step how good it is; without a last one there is no best."""
        try:
            self.store.grade(self.progress.step, score)
        except CheckpointError as error:
            if must:
                raise
            log.error("%s. Training goes on", error)

    def _is_best(self, score: float | None) -> bool:
        """Rank 0's answer on all ranks: the others may see the folder in another state."""
        if score is None:
            return False
        best = self.store.best() if self.world.is_main else None
        better = best is None or score > (best.score or 0.0)
        return bool(self.world.broadcast(better))

    def _checkpoint_due(self, verdict: Verdict) -> bool:
        every = self.config.checkpoints.every_steps
        return verdict.late or bool(every and self.progress.step % every == 0)

    def _save(self, must: bool, score: float | None = None) -> None:
        """Save; a failure is fatal only where nothing would be saved after it."""
        if self._saved_step == self.progress.step:
            return
        self._saved_at = time.monotonic()
        self._refuse_bad_weights()
        try:
            self.store.save(
                self.progress.step,
                self._shared_states(),
                self._own_states(),
                score,
                evaluated=not self._due,
            )
        except CheckpointError as error:
            if must:
                raise
            log.error("%s. Training goes on without this checkpoint", error)
            return
        self._saved_step = self.progress.step
        log.info("saved checkpoint at step %d", self.progress.step)

    def _refuse_bad_weights(self) -> None:
        """A finite loss can have a gradient that is not: such weights are not saved."""
        finite = torch.stack([value.isfinite().all() for value in self.model.parameters()]).all()
        if not finite:
            raise NonFiniteLoss(
                f"weights are not finite after step {self.progress.step}, though every loss was; "
                "they are not saved and the last checkpoint is good: lower optimizer.lr or set "
                "optimizer.clip_norm, in a new run"
            )

    def _shared_states(self) -> dict[str, Any]:
        with self.statistics.averaged(self.world):
            states = {"model": {name: t.clone() for name, t in self.model.state_dict().items()}}
            if self.average:
                states["average"] = self.average.state_dict(self.model)
        states |= {name: part.state_dict() for name, part in self.shared.items()}
        return states | {"identity": self.identity | {"config": self.config.flat()}}

    def _own_states(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.own.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where a checkpoint of this model and configuration was saved.

        Raises:
            CheckpointError: its tensors are of another network.
        """
        load_model(self.model, checkpoint.path, checkpoint.load("model"))
        if self.average:
            self.average.load_state_dict(checkpoint.load("average"))
        rank = self.world.rank if checkpoint.world_size == self.world.world_size else 0
        own = checkpoint.load(f"rank-{rank:05d}")
        if checkpoint.world_size != self.world.world_size:
            # Every rank's own noise and running statistics are gone; the averages stay.
            log.warning(
                "resuming on %d ranks what %d saved: the order of samples and the weights "
                "continue exactly, random states start anew from the seed",
                self.world.world_size,
                checkpoint.world_size,
            )
            own = {"progress": own["progress"]}
        for name, state in own.items():
            self.own[name].load_state_dict(state)
        if self.progress.phase:
            self.engine.close()
            self._begin_phase()
        for name, part in self.shared.items():
            part.load_state_dict(checkpoint.load(name))
        self._due = not checkpoint.evaluated
        self._saved_step = self.progress.step
