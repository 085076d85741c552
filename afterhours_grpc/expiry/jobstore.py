"""APScheduler's job store, whose due jobs are claims, and the executor that receives them."""

import collections.abc
import datetime
import threading
import time

from apscheduler import job as apscheduler_job
from apscheduler.executors import base as executors
from apscheduler.jobstores import base as jobstores
from apscheduler.triggers import base as triggers

from afterhours_grpc.expiry import claims

# Seconds within which a living thread comes back for its next look.
_SILENCE = 5.0


class _Repeat(triggers.BaseTrigger):  # type: ignore[misc]
    """A claimed job is due again when its lease ends."""

    def get_next_fire_time(self, _: object, now: datetime.datetime) -> datetime.datetime:
        return now + datetime.timedelta(seconds=claims.LEASE)


_REPEAT = _Repeat()


class JobStore(jobstores.BaseJobStore):  # type: ignore[misc]
    """The jobs that are due, by `claims`. Jobs are added by `writer.Writer`, from the event loop."""

    def __init__(self, claims: claims.Claims) -> None:
        super().__init__()
        self._claims = claims
        self.stopping = False
        self._thread: threading.Thread | None = None
        self._looking = False
        self._looked_at = time.monotonic()

    def start(self, scheduler: object, alias: str) -> None:
        """Prepare for a scheduler's thread."""
        super().start(scheduler, alias)
        self._looked_at = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether the scheduler's thread lives and comes back for its looks, however long Redis makes one take."""
        if self._thread and not self._thread.is_alive():
            return False
        return self._looking or time.monotonic() - self._looked_at < _SILENCE

    def get_due_jobs(self, now: datetime.datetime) -> list[apscheduler_job.Job]:
        """Claim what is due. At a shutdown, which looks once more, nothing is."""
        self._thread = threading.current_thread()
        self._looking = True
        try:
            return [] if self.stopping else [self._job(claim, now) for claim in self._claims.take()]
        finally:
            self._looked_at = time.monotonic()
            self._looking = False

    def get_next_run_time(self) -> datetime.datetime:
        """Return when to look again.

        Counted from now and not from the beginning of the last look, since the wall clock may have been set meanwhile.
        """
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self._claims.wait)

    def _job(self, claim: claims.Claim, now: datetime.datetime) -> apscheduler_job.Job:
        # Not through the constructor, which would check a callable and its arguments for each of thousands.
        job = apscheduler_job.Job.__new__(apscheduler_job.Job)
        job.id = job.name = str(claim.session_id)
        job.args = (claim,)
        job.next_run_time = now
        job.trigger = _REPEAT
        job.executor = "default"
        job.coalesce = True
        job.misfire_grace_time = None
        job._scheduler, job._jobstore_alias = self._scheduler, self._alias  # noqa: SLF001 - as its jobs are made
        return job

    def update_job(self, job: apscheduler_job.Job) -> None:
        """Do nothing: the claim has moved the job to the end of its lease already."""

    def remove_job(self, job_id: str) -> None:
        """Do nothing: a job is removed when its claim is settled."""

    def remove_all_jobs(self) -> None:
        """Do nothing: the jobs are those of every replica."""

    def add_job(self, job: apscheduler_job.Job) -> None:
        """Raise NotImplementedError: `writer.Writer` adds jobs, without waiting for this thread."""
        raise NotImplementedError

    def lookup_job(self, job_id: str) -> None:
        """Return None: nothing but its due time is stored of a job."""

    def get_all_jobs(self) -> list[apscheduler_job.Job]:
        """Return none, for they may be a million."""
        return []

    def shutdown(self) -> None:
        """Close the connection."""
        self._claims.close()


class ClaimExecutor(executors.BaseExecutor):  # type: ignore[misc]
    """Passes claims to `receive`, in the scheduler's thread; nothing runs in it."""

    def __init__(self, receive: collections.abc.Callable[[claims.Claim], None]) -> None:
        super().__init__()
        self._receive = receive

    def submit_job(self, job: apscheduler_job.Job, _: list[datetime.datetime]) -> None:
        """Pass the claim on, without the counting of instances: it is claimed already."""
        self._receive(*job.args)

    def _do_submit_job(self, job: apscheduler_job.Job, run_times: list[datetime.datetime]) -> None:
        raise NotImplementedError
