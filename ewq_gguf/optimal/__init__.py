"""Policy `optimal`: the types whose measured costs are least within a size."""
