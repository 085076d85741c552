"""All SQL. Postgres is the truth: a transition is one guarded statement over arrays, and its clock decides."""
