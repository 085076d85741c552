"""How timers are kept in Redis: a sorted set for each kind of job, scored by when each is due."""

import dataclasses
import uuid

# When each replica last looked for due jobs, for `doctor`; those of a day ago are forgotten.
PASSES = "afterhours:passes"
# When a replica last began to mend the timers, so that others need not.
MENDED = "afterhours:mended"

# Seconds to wait for Redis to connect, to take a request and to answer it. There are no retries: what is timed is
# looked for, written and swept again and again.
TIMEOUT = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """What jobs are for: the key of their sorted set, and how their ids begin.

    `final`: once the job of a session is done, the session never has another one.
    """

    key: str
    prefix: str
    final: bool

    def job_id(self, session_id: uuid.UUID) -> str:
        """Return the id of the job of a session."""
        return f"{self.prefix}{session_id}"

    def session_id(self, job_id: str) -> uuid.UUID | None:
        """Return the session of a job, or None for a member that no replica of ours wrote."""
        try:
            found = uuid.UUID(job_id.removeprefix(self.prefix))
        except ValueError:
            return None
        return found if job_id == f"{self.prefix}{found}" else None


# A session that has ended never becomes active again. One that was warned of may be extended, and is warned of again.
EXPIRE = Kind("afterhours:jobs", "session:expire:", final=True)
WARN = Kind("afterhours:warnings", "session:warn:", final=False)


def score(at: float) -> str:
    """Return epoch seconds as every replica writes them, to the microsecond."""
    return f"{at:.6f}"
