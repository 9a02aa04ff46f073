"""Drives vqkv's tools through an experiment and makes its tables and figures; standard library only (experiments/README.md).
`driver` runs and resumes, `store` reads what sweeps wrote, `statistics` judges, `tables` and `figures` show."""
