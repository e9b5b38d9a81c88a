"""Manifests of training runs, their execution, and one page of tables about what came out."""
