"""A real PostgreSQL and a real Redis as child processes, for `dev` and for the tests."""
