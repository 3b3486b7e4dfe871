"""Runs the trials of a case of whole jobs, its caches in turns, and sums up what they measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvquant.benchmarks.job_side import JobSide, JobTimes
from kvquant.benchmarks.memory_budget import lowered_budget
from kvquant.benchmarks.team import Team
from kvquant.benchmarks.timing import summarize
from kvquant.energy.monitor import EnergyMonitor
from kvquant.energy.profiler import DetailedEnergyProfiler
from kvquant.errors import UserError
from kvquant.models.oom_retry import fits_in_memory, out_of_memory, release_memory
from kvquant.runtime.progress import note
from kvquant.study.jobs import JobsSpec
from kvquant.study.records import JobSide as SideRecord
from kvquant.study.records import JobTrial

# Bytes that the search of what fits leaves to processes that share a model: what they exchange is
# not allocated while one of them searches alone.
ROOM = 1 << 28
T = TypeVar("T")


class Runner:
    """Runs the trials of one cache and keeps what they measured.

    Args:
        side: The cache's side.
        spec: The study's section `jobs`.
        monitor: Measures energy; None measures times alone.
        team: The processes that run the case.
        alone: The cache's side of a model that talks to no other process, on which what fits is
            searched; None: `side` itself.
    """

    def __init__(
        self,
        side: JobSide,
        spec: JobsSpec,
        monitor: EnergyMonitor | None,
        team: Team | None = None,
        alone: JobSide | None = None,
    ) -> None:
        self.side, self._spec, self._monitor = side, spec, monitor
        self._team, self._alone = team or Team(), alone
        self.batch = 0
        self.slow = False
        self.capacity: int | None = None
        self.context: int | None = None
        self.trials: list[JobTrial] = []
        self.times: list[JobTimes] = []

    def prepare(self) -> None:
        """Finds the batch and runs a job to warm up."""
        team, case = self._team, self.side.case
        searched = self._alone or self.side
        with lowered_budget(searched.devices, 0 if self._alone is None else ROOM):
            self.batch = case.batch_size or 0
            if case.context:
                self.context = team.least(searched.longest_context())
            if case.capacity or not self.batch:
                fitting, capacity = searched.tokens_that_fit()
                self.batch = self.batch or team.least(fitting)
                self.capacity = team.least(capacity)
            given = case.batch_size is not None
            batch, seconds = searched.largest_batch(self.batch, fewer=not given)
            self.batch = team.least(batch)
        if self._alone is not None:
            self._alone = None
            release_memory()
            seconds = 0.0
            if self.batch:
                seconds = self._together(lambda: self.side.job(self.batch)).seconds
            release_memory()
        self.slow = team.most(seconds) > self._spec.slow_seconds

    def _together(self, work: Callable[[], T]) -> T:
        """Runs work of processes that share a model, which none can try again by itself.

        Raises:
            UserError: This process is out of memory, and the others cannot go on without it.
        """
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            told = str(error).partition("\n")[0]
        raise UserError(
            f"batch_size: {self.side.name}: process {self._team.rank} of {self._team.size} is out "
            f"of memory with {self.batch} prompts ({told}), and the others wait for it; give a "
            "smaller one"
        )

    def fits(self) -> bool:
        """Runs a trial and returns whether it fitted in memory."""
        if self._team.size == 1:
            return fits_in_memory(self.trial)
        self._together(self.trial)
        return True

    def _job(self) -> tuple[JobTimes, tuple[float, float] | None]:
        """Runs one job; returns its times and the joules of prompts and answers.

        The joules are known to the first process alone, which meters the GPUs of all.
        """
        team, monitor, joules = self._team, self._monitor, list[float]()

        def begin() -> None:
            team.wait()  # until the GPUs of all are idle
            if monitor is not None:
                monitor.start()
            team.wait()

        def end() -> None:
            team.wait()
            if monitor is not None:
                joules.append(monitor.stop().joules)

        def between() -> None:
            end()
            begin()

        release_memory()  # before energy is counted, which belongs to no job
        if not self.side.case.energy:
            return self.side.job(self.batch), None
        begin()
        times = self.side.job(self.batch, between)
        end()
        return times, (joules[0], joules[1]) if joules else None

    def trial(self) -> None:
        """Runs one trial: a job, or as many as the meter needs."""
        shortest = 0.0
        if self._monitor is not None:
            shortest = max(self._spec.seconds, self._monitor.min_seconds)
        jobs, prefill, decode, joules = 0, 0.0, 0.0, [0.0, 0.0]
        while not jobs or self._team.told(prefill + decode < shortest):
            times, used = self._job()
            self.times.append(times)
            jobs += 1
            prefill += times.prefill_seconds
            decode += times.decode_seconds
            joules = [a + b for a, b in zip(joules, used or (0.0, 0.0), strict=True)]
        measured = self._monitor is not None
        self.trials.append(
            JobTrial(
                jobs=jobs,
                prefill_seconds=prefill,
                decode_seconds=decode,
                prefill_joules=joules[0] if measured else None,
                decode_joules=joules[1] if measured else None,
            )
        )

    def lower(self) -> None:
        """Goes on with a smaller batch, as the last one no longer fits."""
        self.batch -= 1
        if self.side.case.batch_size is not None:
            self.batch = 0
        self.trials.clear()
        self.times.clear()

    def record(self, formula: int | None, idle_watts: float | None) -> SideRecord:
        """Returns the measurements as a side of the record; sizes are those of all processes."""
        side, case = self.side, self.side.case
        sizes = self._team.gathered([times.sizes for times in self.times])
        if not self.trials:
            return SideRecord(
                scheme=side.name,
                status="oom",
                capacity_tokens=self.capacity,
                context_tokens=self.context,
                formula_tokens=formula,
            )
        jobs = sum(trial.jobs for trial in self.trials)
        prompts, answers = (jobs * self.batch * n for n in (case.prompt, case.answer))
        prefill = sum(trial.prefill_seconds for trial in self.trials)
        decode = sum(trial.decode_seconds for trial in self.trials)
        energy: dict[str, float] = {}
        if idle_watts is not None:
            first = sum(t.prefill_joules or 0.0 for t in self.trials)
            second = sum(t.decode_joules or 0.0 for t in self.trials)
            above = first + second - idle_watts * (prefill + decode)
            energy = {
                "joules_per_prompt_token": first / prompts,
                "joules_per_answer_token": second / answers,
                "joules_per_token": (first + second) / (prompts + answers),
                "joules_per_token_above_idle": above / (prompts + answers),
            }
        peaks = [[n for one in job for n in one.peaks] for job in zip(*sizes, strict=True)]
        highest = max(peaks, key=sum)
        last = [job[-1] for job in sizes]
        cache_bytes, elements = sum(n.cache_bytes for n in last), sum(n.elements for n in last)
        return SideRecord(
            scheme=side.name,
            status="ok",
            decoder=self.times[-1].decoder,
            batch_size=self.batch,
            capacity_tokens=self.capacity,
            context_tokens=self.context,
            formula_tokens=formula,
            trials=self.trials,
            first_token_ms=summarize([ms for times in self.times for ms in times.first_token_ms]),
            step_ms=summarize([ms for times in self.times for ms in times.step_ms]),
            prefill_tokens_per_s=prompts / prefill,
            decode_tokens_per_s=answers / decode,
            job_tokens_per_s=(prompts + answers) / (prefill + decode),
            peak_bytes=sum(highest) or None,
            gpu_peak_bytes=highest if len(highest) > 1 and sum(highest) else None,
            steady_bytes=sum(n.steady for n in last) or None,
            cache_bytes=cache_bytes,
            cache_elements=elements,
            bits_per_element=8 * cache_bytes / elements,
            **energy,
        )


def turns(runners: list[Runner], trials: int, profiler: DetailedEnergyProfiler | None) -> None:
    """Lets the caches run their trials in turns; a slow one runs the first alone.

    A batch that fitted before and no longer does, because free memory is scattered, is lowered, and
    the cache's trials begin anew.
    """
    for number in range(trials):
        for runner in runners:
            if runner.slow and number:
                continue
            while runner.batch and len(runner.trials) <= number:
                if profiler is not None:
                    profiler.label = runner.side.name
                done = f"trial {len(runner.trials) + 1}, {runner.batch} prompts"
                note(f"jobs: {runner.side.name}: {done}")
                if not runner.fits():
                    runner.lower()
