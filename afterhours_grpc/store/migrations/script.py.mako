"""${message}.

Expand only: the release before this one runs on the new schema, and drops what it needs a release later.
"""

from alembic import op

revision = "${up_revision}"
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Apply."""
    op.execute("")
