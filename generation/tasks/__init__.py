"""Training tasks of LaytonGen, its judge and its planner; all built on `layton.tasks.base.LaytonTask`."""
