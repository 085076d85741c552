"""After-hours sessions over gRPC: Postgres is the truth, Redis holds the timers."""
