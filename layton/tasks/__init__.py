"""Training tasks: one LightningModule per stage, all built on `layton.tasks.base.LaytonTask`."""
