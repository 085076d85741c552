"""How the schema came to be: numbered revisions, each one expanding it so that the release before still runs."""
