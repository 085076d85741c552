"""Sessions end on time: timers in Redis that any replica may lose, and a sweep over Postgres that none can."""
