"""When and where the pipeline runs: Prefect flows that walk DVC's graph. No stage knows of them."""
