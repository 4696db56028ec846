"""Everything that happens before an engine runs: finding the model, choosing options, starting processes."""
