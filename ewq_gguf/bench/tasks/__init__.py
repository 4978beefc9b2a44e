"""Tasks: what `ewq bench` measures with a loaded model."""
