"""The events of sessions: put into places, and told to those who watch."""
