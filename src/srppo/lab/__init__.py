"""The embedded world: a tiny pretrained model and string tasks with exact answers, for the demo, tests and evidence (docs/lab.md)."""
