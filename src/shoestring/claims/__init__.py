"""One file a paper: what it says, our experiment, and the bound fixed beforehand; `records/` is for the command."""
