"""The paper's experiments: presets, run folders, figures, claims and the report."""
