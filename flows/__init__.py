"""When and where the pipeline runs: Prefect flows that walk DVC's graph. The stages in `tda/` know nothing of them."""
